# shellcheck shell=bash
# What the job scripts share. SLURM runs a copy of a script, so that paths are those of where sbatch was called: the
# repository, or another folder with scripts/ in it.
set -euo pipefail
. scripts/slurm/site.sh

# srun takes the cores of a task from sbatch no more (since 22.05).
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Cores are for loading processes where a GPU computes.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}"
fi

# This job as scontrol takes it. By the bare number of an array, which is that of one of its elements too, all would go
# back into the queue.
job="$SLURM_JOB_ID"
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi

# A task that fails ends the others at once, which would wait for it.
step() {
    srun --kill-on-bad-exit=1 "$PYTHON" "$@"
}

# As many processes as tasks. --ckpt_path last: the latest checkpoint of the run's folder, none at first.
fit() {
    step scripts/train.py fit "$@" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES" \
        --ckpt_path last
}

# Score, certify and attack what was trained, on the test sets of its config; results.json is what `lipsim report` reads.
# 75: the time is nearly over. A test begins anew, so the job goes back into the queue only where training took most of its
# time: what has had the greater part of it once would never be done.
certify() {
    local began=$SECONDS status=0
    step scripts/train.py test "$@" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES" \
        --ckpt_path last || status=$?
    if [ "$status" -eq 75 ] && [ "$began" -gt $((SECONDS - began)) ]; then
        scontrol requeue "$job" || echo "submit the job again, it continues" >&2
    elif [ "$status" -eq 75 ]; then
        echo "error: the test takes longer than the job may; give sbatch a longer --time, or evaluate.sbatch the metric" >&2
    fi
    return "$status"
}

# Run what continues by itself when it is started again, and put the job back into the queue when the signal of
# `#SBATCH --signal=B:SIGUSR1@…` says that its time is nearly over. In the background: bash waits for a command in the
# foreground before it minds a signal.
requeue_before_the_end() {
    trap 'scontrol requeue "$job" || echo "submit the job again, it continues" >&2' USR1
    "$@" &
    local status=0
    wait $! || status=$?
    while kill -0 $! 2>/dev/null; do # the signal ended the wait, not the command
        status=0
        wait $! || status=$?
    done
    return "$status"
}

# Line N of a table, without comments and empty ones, into `words`: a name, then options (without spaces in them).
line_of() {
    local lines
    mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$1")
    if [ "$2" -lt 1 ] || [ "$2" -gt "${#lines[@]}" ]; then
        echo "error: expected a line 1 to ${#lines[@]} of $1, got $2; give sbatch --array=1-${#lines[@]}" >&2
        exit 2
    fi
    # shellcheck disable=SC2034
    read -ra words <<<"${lines[$2 - 1]}"
}
