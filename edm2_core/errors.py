"""The class of all errors caused by a caller's input, by which commands tell them from faults of this package."""


class InputError(ValueError):
    """Input that breaks a rule. The message is one line: the rule, what came, what to do."""
