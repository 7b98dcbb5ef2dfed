"""The errors of this package: one for a file, one for all that is wrong with a configuration."""

from nodewalld.core.config import Problem


class ConfigError(Exception):
    """The configuration can't be taken; `problems` are in the order of the files and their lines."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class FileError(Exception):
    """A file or folder that can't be taken; `line` is where in it, or 0 when it is not about its content."""

    def __init__(self, message: str, cure: str, line: int = 0, key: str = "file") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure
        self.line = line
        self.key = key
