"""Cross-consistency training (Ouali et al. 2020), in the form of SSL4MIS that the paper's tables used.

One shared encoder, a main decoder, three auxiliary ones that see its features through F-Noise, Dropout and F-Drop on
all five levels. Supervised: the mean of 0.5 * BCE + Dice over all four decoders. Unlabeled: the mean over the auxiliary
ones of MSE(main, auxiliary), with gradient into both sides. These are MGCC's losses; what MGCC changes is the network.
"""

from mgcc_dist.methods.mgcc import MultiLevelCrossConsistency


class CrossConsistencyTraining(MultiLevelCrossConsistency):
    """MGCC's losses on a plain U-Net with three auxiliary decoders."""

    networks = ("cct",)
