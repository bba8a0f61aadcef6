"""The scheduler and the servers of a cluster job: ``python -m jobs.parameter_server``.

MXNet turns any process with ``DMLC_ROLE`` scheduler or server into one while ``import mxnet``
runs. An optimiser of ours that workers send to a server could not be unpickled there: its module
imports MXNet, which is not imported yet. Here MXNet is imported first.
"""

import os
import sys

ROLE = "DMLC_ROLE"


def main() -> int:
    """Serve until the job's workers have gone."""
    role = os.environ.pop(ROLE)
    from mxnet_compat import mx

    os.environ[ROLE] = role
    mx.kv.KVStoreServer(mx.kv.create("dist")).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
