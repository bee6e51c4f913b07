"""What is looked at in a .pt2 before torch loads it: nothing in it may be a pickle that does more than hold tensors.

torch itself falls back to pickles without limits. This is a hurdle and no proof: a .pt2 is a program, and torch
evaluates the texts of its sizes as Python.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile

import torch

from s2cd.errors import ModelError

_PICKLES = re.compile(r"\.pt$|serialized_(state_dict|constants)\.json$")  # torch before 2.8 wrote the latter
_LISTS = re.compile(r"data/(weights|constants)/.*_config\.json$")
_FOREIGN = re.compile(r"custom_obj|opaque_obj|aotinductor")


def checked(name: str, data: bytes) -> io.BytesIO:
    """Return the archive `data` written anew from what was looked at: torch and zipfile may read another one apart.

    Raises ModelError, which calls the file `name`, if it holds more than tensors and a graph; what zipfile and
    torch.load raise if it is damaged or no archive.
    """
    fresh = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as given, zipfile.ZipFile(fresh, "w") as written:
        members = given.namelist()
        if len({member.lower() for member in members}) < len(members):  # torch takes no heed of case
            raise ModelError(f"{name} holds two files of one name, expected each once")
        for member in members:
            content = given.read(member)
            found = _danger(member.lower(), content)
            if found:
                raise ModelError(f"{name}: {member} {found}, expected tensors alone: it could run code when loaded")
            written.writestr(member, content)
    fresh.seek(0)
    return fresh


def _danger(member: str, content: bytes) -> str | None:
    """Tell what could run code of its own when torch loads this member of an archive."""
    if _FOREIGN.search(member):
        return "is an object or a compiled library"
    if _PICKLES.search(member) and not _holds_tensors(content):
        return "holds a pickled object"
    if _LISTS.search(member) and any(entry["use_pickle"] is not False for entry in _entries(content)):
        return "lists a pickled object"
    return None


def _holds_tensors(content: bytes) -> bool:
    if not content:  # no example was kept
        return True
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # what else it raises is of a damaged file, and told in its own words
        return False
    return True


def _entries(content: bytes) -> list[dict[str, bool]]:
    return list(json.loads(content)["config"].values())
