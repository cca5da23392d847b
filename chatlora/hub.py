"""Whether the hub answers: found out once and in seconds, where its own library tries for a minute."""

from functools import cache
from time import sleep

SECONDS = 5.0  # for one try; there are two, since a name server may forget to answer once


@cache
def why_unreachable() -> str | None:
    """What keeps the hub from being asked; None where it answers, whatever it says.

    It is what HF_ENDPOINT names, through the proxies that are set, and not asked at all under HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    reason = ""
    for pause in (0, 1):
        sleep(pause)
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except Exception as error:  # each HTTP library that huggingface_hub has stood on has its own
            reason = " ".join(str(error).split()) or type(error).__name__
        else:
            return None
    return f"{constants.ENDPOINT} cannot be reached: {reason}"
