"""Operations of MGCC in forms that are fast, and the plain forms that they must equal; needs torch alone."""
