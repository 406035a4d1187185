"""What every error caused by a caller's input is, so that commands can tell it from a fault of ours."""


class InputError(ValueError):
    """Input that breaks a rule. The message is one line: the rule, what came, what to do."""
