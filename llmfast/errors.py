"""Errors a user can mend."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    The message is one line that says what is wrong, where, and how to mend it.
    The command line prints it without a traceback and exits with code 2.
    """
