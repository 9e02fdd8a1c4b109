"""The one exception a user's mistake raises."""


class InputError(ValueError):
    """What was given is wrong. The message, one line, says what was wrong and what would be right.

    Library code raises it for bad arguments, files and checkpoints; the command line prints its message
    alone and exits with code 2. Any other exception is a bug of ours and keeps its traceback.
    """
