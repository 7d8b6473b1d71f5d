"""What `check` prints of a data set."""

import io

from rich.console import Console

from reference_models.data.check import check


def checked(settings):
    """(exit code, what `check` printed)"""
    text = io.StringIO()
    return check(settings, Console(file=text, width=80)), text.getvalue()


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]
