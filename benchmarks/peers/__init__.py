"""What people write today, with the same weights: each a script of one page, as a competent user would."""
