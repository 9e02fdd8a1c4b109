"""The exception that a user's mistake raises, and that of a process which others wait for in vain."""


class InputError(ValueError):
    """What was given is wrong. The message, one line, says what was wrong and what would be right.

    Library code raises it for bad arguments, files and checkpoints; the command line prints its message
    alone and exits with code 2. Any other exception but the next one is a bug of ours and keeps its traceback.
    """


class ProcessLost(RuntimeError):
    """Another process of those that train together has ended, or does not answer. The message, one line, says where.

    The command line prints it alone, with the process's number, and exits with code 3.

    Args:
        late: the other one may still run: it has not answered within torch.distributed's timeout.
        place: how far this process was.
        who: the other one, or the others.
    """

    def __init__(self, late: bool, place: str, who: str = "another rank") -> None:
        super().__init__(f"waited in vain for {who} at {place}" if late else f"{who} ended, seen at {place}")
        self.late, self.place, self.who = late, place, who
