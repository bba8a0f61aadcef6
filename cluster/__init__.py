"""Jobs of several processes: who starts, watches and ends them. ``launch.py`` is the way in.

The roles (one scheduler, some servers, some workers) and their environment variables are those of
MXNet's parameter server, ps-lite (https://github.com/dmlc/ps-lite). What ps-lite lacks is here:
starting the processes, noticing that one is gone, and leaving none behind.
"""
