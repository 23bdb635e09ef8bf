"""The test harness: real servers, real mounts, images, a Linux guest.

Nothing here knows how qedfs works inside: it is driven through its command line, as a user does.
"""
