"""What several test files share: sizes, attributes that fit them, and a thread of one's own."""

import threading

import torch

B, T, D, E, A = 4, 3, 6, 4, 3  # batch, tokens, width, experts, attribute values
GOOD = torch.tensor([0, 2, 1, 2])


def in_a_thread(work):
    """Runs ``work`` where no scope was ever opened, and hands back its result or its error."""
    outcome = []

    def target():
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
