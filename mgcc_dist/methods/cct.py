"""Cross-consistency training, CCT (Ouali et al. 2020), as implemented by SSL4MIS, which the paper's tables used.

One shared encoder, a main decoder, and three auxiliary decoders whose input features are perturbed on all five levels
by F-Noise, Dropout and F-Drop. Supervised loss: the mean of 0.5 * BCE + Dice over all four decoders. Consistency loss:
the mean over the auxiliary decoders of MSE(main, auxiliary), with gradient into both sides. The losses are MGCC's; only
the network differs.
"""

from mgcc_dist.methods.mgcc import MultiLevelCrossConsistency


class CrossConsistencyTraining(MultiLevelCrossConsistency):
    """MGCC's losses on a plain U-Net with three auxiliary decoders."""
