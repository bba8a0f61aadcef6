"""What is read: lists, samplers, decoders, transforms and loaders of videos and images.

Importing this package loads nothing: the worker processes import single modules of it and must
stay light (they never load MXNet).
"""
