"""The one training loop, for autoencoder, denoiser and segmentation: `fit(task, config, folder, accelerator)`."""
