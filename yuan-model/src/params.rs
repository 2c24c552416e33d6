//! Parameter counts by formula, from the config alone.

use crate::{RouterType, YuanConfig};

/// Parameters of a model by part; nothing is allocated to count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// Input embedding, V · H.
    pub embedding: u64,
    /// Output head, V · H; never tied to the embedding.
    pub head: u64,
    /// Queries, keys, values and output projections of all layers, 4 · P · H each.
    pub attention: u64,
    /// Localized filters of all layers with their norm and biases.
    pub filter: u64,
    /// The two norms of every layer and the final one.
    pub norms: u64,
    /// Routers of all layers, with their biases if they have any.
    pub routers: u64,
    /// Experts of all layers, 3 · H · F each.
    pub experts: u64,
    /// The experts that one token visits, over all layers.
    pub active_experts: u64,
    /// The image tower, if there is one.
    pub tower: u64,
    /// The projector from the tower to the language model: three matrices and a norm.
    pub projector: u64,
}

impl ParameterCount {
    /// All parameters.
    pub fn total(&self) -> u64 {
        self.language() + self.projector + self.tower
    }

    /// Parameters of the language model.
    pub fn language(&self) -> u64 {
        self.embedding + self.head + self.backbone() + self.experts
    }

    /// Parameters that one token uses, with those of images left out, embedding and head included.
    pub fn active(&self) -> u64 {
        self.embedding + self.active_without_embedding()
    }

    /// Parameters that take part in a matrix product for one token: [`active`](Self::active) less
    /// the embedding.
    pub fn active_without_embedding(&self) -> u64 {
        self.head + self.active_without_vocabulary()
    }

    /// Parameters that one token uses, less embedding and head.
    pub fn active_without_vocabulary(&self) -> u64 {
        self.backbone() + self.active_experts
    }

    fn backbone(&self) -> u64 {
        self.attention + self.filter + self.norms + self.routers
    }
}

impl YuanConfig {
    /// Counts the parameters of the model.
    pub fn parameter_count(&self) -> ParameterCount {
        let [v, h, p, f] = [
            self.vocab_size,
            self.hidden_size,
            self.attention_projection_size,
            self.expert_hidden_size,
        ]
        .map(|n| n as u64);
        let layers = self.num_layers() as u64;
        let experts: u64 = self.experts_per_layer.iter().map(|&n| n as u64).sum();
        let expert = 3 * h * f;
        let filter_bias = if self.filter_bias { h / 2 + h } else { 0 };
        let filter = if self.localized_filter { 2 * h * h + filter_bias + h } else { 0 };
        let router_rows = match self.router_type {
            RouterType::Attention => 3,
            RouterType::Linear => 1,
        };
        let (tower, projector) = match &self.images {
            Some(images) => {
                let from = 4 * images.tower.hidden_size as u64;
                (images.tower.parameters(), 2 * from * f + f * h + h)
            }
            None => (0, 0),
        };
        ParameterCount {
            embedding: v * h,
            head: v * h,
            attention: layers * 4 * p * h,
            filter: layers * filter,
            norms: layers * 2 * h + h,
            routers: router_rows * experts * h
                + if self.router_selection_bias { experts } else { 0 },
            experts: experts * expert,
            active_experts: layers * self.top_k as u64 * expert,
            tower,
            projector,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::ImageConfig;

    fn at_vocabulary(config: YuanConfig, vocab_size: usize) -> ParameterCount {
        YuanConfig { vocab_size, ..config }.parameter_count()
    }

    #[test]
    fn the_published_totals_are_reproduced_exactly() {
        assert_eq!(at_vocabulary(YuanConfig::flash(), 135_040).total(), 40_219_404_288);
        assert_eq!(YuanConfig::flash().parameter_count().total(), 40_223_598_592);
        assert_eq!(at_vocabulary(YuanConfig::ultra(), 135_040).total(), 1_010_643_655_680);
        assert_eq!(YuanConfig::ultra().parameter_count().total(), 1_010_653_092_864);
        // The projector of the multimodal model makes up the rest of the published count.
        let images = Some(ImageConfig::published());
        let ultra = YuanConfig { images: images.clone(), ..YuanConfig::ultra() }.parameter_count();
        assert_eq!(ultra.language() + ultra.projector, 1_010_862_812_672);
        assert_eq!((ultra.tower, ultra.projector), (304_012_288, 209_719_808));
        assert_eq!(ultra.total(), 1_010_862_812_672 + 304_012_288);
        let flash = YuanConfig { images, ..YuanConfig::flash() }.parameter_count();
        assert_eq!(flash.projector, 83_888_128);
    }

    #[test]
    fn every_row_of_the_published_arithmetic_is_reproduced() {
        let flash = at_vocabulary(YuanConfig::flash(), 135_040);
        assert_eq!(flash.attention / 24, 33_554_432);
        assert_eq!(flash.filter / 24, 8_391_680 + 2_048);
        assert_eq!(flash.experts, 38_654_705_664);
        assert_eq!(flash.routers, 4_718_592);
        assert_eq!(flash.attention + flash.filter + flash.norms - 2_048, 1_006_854_144);
        assert_eq!(flash.embedding, 276_561_920);
        assert_eq!(flash.active_without_vocabulary(), 3_427_493_888);
        assert_eq!(flash.active_without_embedding(), 3_704_055_808);
        assert_eq!(flash.active(), 3_980_617_728);

        let ultra = at_vocabulary(YuanConfig::ultra(), 135_040);
        assert_eq!(ultra.attention / 103, 169_869_312);
        assert_eq!(ultra.filter / 103, 42_467_328 + 4_608);
        assert_eq!(YuanConfig::ultra().experts_per_layer.iter().sum::<usize>(), 4360);
        assert_eq!(ultra.experts, 987_506_933_760);
        assert_eq!(ultra.routers, 20_090_880);
        assert_eq!(ultra.attention + ultra.filter + ultra.norms - 4_608, 21_872_097_792);
        assert_eq!(ultra.embedding, 622_264_320);
        assert_eq!(ultra.active_without_vocabulary(), 68_549_630_976);
        assert_eq!(ultra.active_without_embedding(), 69_171_895_296);
        assert_eq!(ultra.active(), 69_794_159_616);
    }

    #[test]
    fn pruning_takes_a_third_of_ultra() {
        let before = YuanConfig::ultra_unpruned().parameter_count();
        let without_vocabulary = before.total() - before.embedding - before.head;
        assert_eq!(without_vocabulary / 100_000_000, 15_149, "1514.9 B");
        let after = YuanConfig::ultra().parameter_count().total();
        let reduction = 1.0 - after as f64 / before.total() as f64;
        assert!((reduction - 0.333).abs() < 0.001, "{reduction}");
    }
}
