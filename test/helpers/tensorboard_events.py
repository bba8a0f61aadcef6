"""What TensorBoard's event files say, by tensorboardX's own records."""

import os
import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog


def starts(folder):
    """Return the step at which each event file of a folder begins (``purge_step``)."""
    found = []
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as stream:
            content = stream.read()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            if event.session_log.status == SessionLog.START:
                found.append(event.step)
            content = content[16 + length :]
    return found
