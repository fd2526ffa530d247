"""Values of SLURM options, checked before sbatch sees them: a wrong one is told with what would do."""

from __future__ import annotations

import re

from unfold.pretrain.errors import UserError

MOST_LEAD = 600  # seconds between the signal and the time limit, unless set otherwise
TIME_FORMATS = (
    (r"(\d+)", (60,)),
    (r"(\d+):(\d+)", (60, 1)),
    (r"(\d+):(\d+):(\d+)", (3600, 60, 1)),
    (r"(\d+)-(\d+)", (86400, 3600)),
    (r"(\d+)-(\d+):(\d+)", (86400, 3600, 60)),
    (r"(\d+)-(\d+):(\d+):(\d+)", (86400, 3600, 60, 1)),
)


def seconds(setting: str, text: str) -> int:
    """Seconds of a SLURM time limit. Raises UserError naming the setting."""
    for pattern, units in TIME_FORMATS:
        if match := re.fullmatch(pattern, text.strip()):
            total = sum(int(part) * unit for part, unit in zip(match.groups(), units))
            if total > 0:
                return total
    raise UserError(
        f"{setting}: {text!r} is not a time limit; give MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, e.g. 90, 4:00:00 or 1-12"
    )


def memory(setting: str, text: str) -> str:
    """A SLURM memory size. Raises UserError naming the setting."""
    if not re.fullmatch(r"\d+[KMGT]?", text.strip(), re.IGNORECASE):
        raise UserError(f"{setting}: {text!r} is not a memory size; give a number with K, M, G or T, e.g. 480G; 0 for all of it")
    return text.strip()


def signal_lead(given: int, limit: int) -> int:
    """Seconds before the time limit at which a job is told to save: as given, else ten minutes or a fifth of the limit.

    Raises:
        UserError: the signal would come before the job has begun.
    """
    lead = given or min(MOST_LEAD, limit // 5)
    if lead >= limit:
        raise UserError(f"--signal-lead {lead}: is not below the time limit of {limit} s; a tenth of it ({limit // 10}) would do")
    return lead


def one_line(setting: str, text: str) -> str:
    """A value that stands on one line of a script. Raises UserError for line breaks and other control characters."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise UserError(f"{setting}: {text!r} holds a line break or a control character")
    return text
