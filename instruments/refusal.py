"""The one way in which an instrument says that it cannot read."""


class Refusal(Exception):
    """A reading that is not possible here, with the reason and, where there is one, the remedy.

    Raised inside a reading only. The cockpit logs it as a failed reading and goes on; `strict=True` lets it through.
    """
