"""Recorded play: episodes on disk, the recorder, and the real worlds it records. No torch.

Importing this package is cheap; engines (vizdoom, gymnasium) are imported by the call that opens them.
"""
