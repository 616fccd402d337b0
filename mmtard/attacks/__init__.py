"""PGD, APGD, FAB and Square; the ensemble that takes each sample's worst case; checks that an attack is sound."""
