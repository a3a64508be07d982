"""What runs inside an engine's process, where mmq need not be installed: this folder goes on its PYTHONPATH.

Each module is called mmq_*, so that it shadows nothing there, and imports the standard library alone
(and Pillow and OpenCV, where they are there).
"""
