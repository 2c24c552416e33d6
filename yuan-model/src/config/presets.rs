//! Published configurations, and toys.

use super::{RouterType, SpecialTokens, YuanConfig};

/// Experts per layer of the released Ultra model, after its pruning (`per_layer_experts_blocks`).
fn ultra_experts() -> Vec<usize> {
    let mut experts = vec![40, 48, 24, 16, 24, 16, 16, 24, 32, 32, 24, 24, 24, 40, 40, 40];
    experts.extend([48; 69]);
    experts.extend([40; 8]);
    experts.extend([32; 6]);
    experts.extend([24, 24, 16, 8]);
    experts
}

impl YuanConfig {
    /// Yuan3.0 Flash, "40B": 24 layers of 32 experts, attention router.
    pub fn flash() -> Self {
        Self {
            hidden_size: 2048,
            num_attention_heads: 16,
            attention_projection_size: 4096,
            expert_hidden_size: 8192,
            experts_per_layer: vec![32; 24],
            router_type: RouterType::Attention,
            filter_bias: true,
            rotary_percent: 0.5,
            max_seq_len: 131_072,
            init_std: 0.01,
            embedding_init_std: None,
            router_selection_bias: false,
            tokens: SpecialTokens {
                bos: Some(77185),
                eos: vec![77185],
                pad: Some(77188),
                eod: Some(77185),
                sep: Some(135_979),
                mask: Some(134_953),
            },
            ..Self::toy(136_064)
        }
    }

    /// Yuan3.0 Ultra, "1010B": 103 layers of 8 to 48 experts after pruning, linear router.
    pub fn ultra() -> Self {
        Self {
            hidden_size: 4608,
            num_attention_heads: 36,
            attention_projection_size: 9216,
            expert_hidden_size: 16384,
            experts_per_layer: ultra_experts(),
            router_type: RouterType::Linear,
            filter_bias: false,
            rotary_percent: 1.0,
            max_seq_len: 65_536,
            ..Self::flash()
        }
    }

    /// Yuan3.0 Ultra before pruning, "1515B": 64 experts in each of the 103 layers.
    pub fn ultra_unpruned() -> Self {
        Self { experts_per_layer: vec![64; 103], ..Self::ultra() }
    }

    /// About 30 M parameters at a vocabulary of 4,096: 4 layers of 16 experts, top-2, linear
    /// router.
    pub fn toy(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            hidden_size: 256,
            num_attention_heads: 4,
            attention_projection_size: 512,
            expert_hidden_size: 512,
            experts_per_layer: vec![16; 4],
            top_k: 2,
            router_type: RouterType::Linear,
            localized_filter: true,
            filter_bias: false,
            norm_epsilon: 1e-6,
            rotary_base: 1e6,
            rotary_percent: 1.0,
            rotary_dim: None,
            position_divisor: None,
            yarn: None,
            max_seq_len: 512,
            init_std: 0.0625,
            embedding_init_std: Some(0.5),
            router_selection_bias: false,
            attention_dropout: 0.0,
            hidden_dropout: 0.0,
            logit_scale: 1.0,
            isolate_documents: false,
            tokens: SpecialTokens::default(),
            images: None,
        }
    }

    /// A model for tests that trains in milliseconds: 2 layers of 8 experts, width 32.
    pub fn tiny(vocab_size: usize) -> Self {
        Self {
            hidden_size: 32,
            num_attention_heads: 2,
            attention_projection_size: 64,
            expert_hidden_size: 32,
            experts_per_layer: vec![8; 2],
            max_seq_len: 64,
            ..Self::toy(vocab_size)
        }
    }
}
