"""MiniCPM-V 2.5, 2.6, 4.0 and 4.5, and the eyes and words of MiniCPM-o 2.6, without their remote code.

What transformers has no class for: vision tower, resampler, slices, prompt layout. The text models are transformers'
own. `build(folder, dtype=...)` in model.py is the way in; nothing outside this package knows the model.
"""
