"""What is read: videos and images, as batches for a network.

How a clip travels, each step an object that can be replaced by one's own::

    list       video/list.py          rows (identifier, class, path) and where the files lie
    sampler    video/sampler.py       which frames of a video make a clip
    reader     video/readers.py       these frames, by decord
    transform  common/transforms.py,  frames -> the array of the network's input
               video/transforms.py
    dataset    video/dataset.py       puts these together: item number -> request -> sample
    loader     common/loader.py       requests to the workers (common/pool.py, worker_main.py),
                                      samples to batches

``video/loaders.py`` makes the usual choices for training, validation and testing. An image goes the
same way, from ``image/source.py`` through ``image/dataset.py``, as a clip of one frame.

Importing this package loads nothing: the worker processes import single modules of it and must
stay light (they never load MXNet).
"""
