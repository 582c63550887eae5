"""The networks: one diffusion transformer, its cache, and the codecs between frames and latents."""
