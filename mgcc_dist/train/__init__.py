"""The training loop of autoencoder, denoiser and segmentation: `fit(task, config, folder, accelerator)`."""
