#!/usr/bin/env bash
# Run the client itself as a batch job, so that no login node and no open terminal is needed. It asks for its workers
# by itself, as the profile says, and gives them back.
#
#   Slurm:  sbatch cluster/submit.sh s2cd run CATALOG --out maps --cluster cluster/slurm-gpu.yaml -q
#   PBS:    export S2CD_COMMAND="s2cd run CATALOG --out maps --cluster cluster/pbs.yaml -q"
#           qsub -V cluster/submit.sh
#
# The client needs little: it holds the scheduler and the plan, never pixels. Submit the same command again to go on
# where a job ended: finished maps stay.
#
#SBATCH --job-name=s2cd
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=1-00:00:00
#SBATCH --output=s2cd-%j.log
#SBATCH --signal=B:INT@120
#PBS -N s2cd
#PBS -l select=1:ncpus=2:mem=8gb
#PBS -l walltime=24:00:00
#PBS -j oe

set -euo pipefail
cd "${PBS_O_WORKDIR:-$PWD}"

# Worker jobs ask for their own resources: what this job was given must not reach their requests.
unset "${!SBATCH_@}" SLURM_CPUS_PER_TASK SLURM_MEM_PER_NODE SLURM_MEM_PER_CPU SLURM_NTASKS SLURM_GRES

if [ "$#" -gt 0 ]; then
    exec "$@"
fi
exec bash -c "${S2CD_COMMAND:?expected a command: as arguments, or in S2CD_COMMAND}"
