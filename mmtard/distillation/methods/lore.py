"""`lore`: adversarial fine-tuning of embeddings under a bound on the clean ones,

    || z_S(x') - z_T0(x) ||^2 + lambda(x) (|| z_S(x) - z_T0(x) ||^2 - rho || z_T0(x) ||^2),

the embeddings not normalised, no labels; the attack maximises the first distance, which is computed here. The second
term, whose multipliers lambda a network learns, is `mmtard.distillation.added_terms.bound`. Khodabandeh et al., "LORE:
Lagrangian-Optimized Robust Embeddings for Visual Encoders", arXiv 2505.18884.
"""

from .fare import loss, passes

__all__ = ["loss", "passes"]
