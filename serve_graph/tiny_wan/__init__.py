"""The tiny Wan: the world it was trained on, how it is trained, and how its clips are measured."""
