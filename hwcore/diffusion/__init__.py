"""Disaggregated diffusion: encoder, denoiser and decoder in processes of their own."""
