"""The program that makes worlds: ``python -m train stage=codec|teacher|ar_diffusion|evaluate``. Nothing imports it."""
