"""mmq: from a vision-language checkpoint to an int4 artifact that is proven, served and measured."""

__version__ = "0.1.0"
