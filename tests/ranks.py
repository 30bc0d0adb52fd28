"A parent that has imported torch once and forks ranks: `ranks.py BASE CLEANSE CONFIG OUT`, a port a line on stdin."

import os
import sys

import torch

from so8t.train import distributed


def main():
    "For each line on stdin two ranks; their process ids on stdout."
    for line in sys.stdin:
        port, world, *places = line.split()
        for rank in range(int(world)):
            pid = os.fork()
            if not pid:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
                sys.argv = ["train", *places]
                code = 1
                try:
                    distributed.main()
                    code = 0
                except BaseException as error:
                    print(type(error).__name__, error, file=sys.stderr, flush=True)
                finally:
                    os._exit(code)
            print(f"pid {pid}", flush=True)
        codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(int(world))]
        print("ended", *codes, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
