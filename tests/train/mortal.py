"""The command line, but rank 1 is killed in its n-th step the first time: MORTAL=n."""

from __future__ import annotations

import os
import signal

from sparsekd.cli import main
from sparsekd.train import Trainer

if __name__ == "__main__":
    left = int(os.environ.get("MORTAL", "0"))
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if left and first_time and os.environ["RANK"] == "1":
        train_step = Trainer._train_step

        def step(self, *arguments):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            train_step(self, *arguments)

        Trainer._train_step = step  # type: ignore[method-assign]
    main()
