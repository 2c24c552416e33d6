//! Tower, projector and segmentation against upstream's numbers (`vision_tiny` of the reference).

mod support;

use burn::tensor::{Tensor, TensorData};
use support::{
    Fixture, Kind, assemble, assert_gradient, assert_near, assert_near_scaled, devices, fill,
    fixtures, gradients, reference, sources_under,
};
use yuan_model::{
    ModelError, YuanConfig,
    vision::{
        ImageConfig, ImageEncoder, Picture, TileGrid, VisionConfig, VisionNormType, VisionTower,
        pixel_unshuffle, placeholders, put_in_place,
    },
};

fn configs() -> (YuanConfig, ImageConfig) {
    let text = std::fs::read_to_string(reference().join("vision_tiny/config.json")).unwrap();
    let config = YuanConfig::from_json(&text).unwrap();
    let images = config.images.clone().unwrap();
    (config, images)
}

fn number(value: &serde_json::Value) -> usize {
    value.as_u64().unwrap() as usize
}

#[test]
fn tower_and_projector_agree_with_the_reference() {
    let (language, images) = configs();
    let weights = Fixture::load("vision_tiny/model.safetensors");
    let io = Fixture::load("vision_tiny/io.safetensors");
    let sources = sources_under(&language, "images.", "");
    for (name, device) in devices() {
        let device = device.autodiff();
        let encoder = ImageEncoder::new(&images, &language, &device).unwrap();
        let encoder = fill(encoder, &sources, &weights, "");
        let ImageEncoder { tower, projector } = &encoder;
        let near = |key: &str, ours: &Tensor<3>| {
            assert_near(&format!("{name} {key}"), ours, io.host(key), Kind::Activation);
        };

        let pixels = io.tensor::<4>("input.pixel_values", &device).require_grad();
        let embedded = tower.embed(pixels.clone());
        near("vision.embeddings", &embedded);
        let mut x = embedded;
        for (layer, block) in tower.blocks.iter().enumerate() {
            x = block.forward(x);
            near(&format!("vision.hidden_states.{layer}"), &x);
        }
        let joined = pixel_unshuffle(x);
        let [tiles, tokens, width] = joined.dims();
        let flat = joined.clone().reshape([tiles * tokens, width]);
        assert_near("projector.input", &flat, io.host("projector.input"), Kind::Activation);
        let [rows, before_norm] = projector.forward(joined);
        let hidden = language.hidden_size;
        let flat = before_norm.reshape([tiles * tokens, hidden]);
        // Before the norm the values are as large as the products of so many make them.
        let expected = io.host("projector.mlp_out");
        let largest = expected.values.iter().fold(1.0_f32, |max, x| max.max(x.abs()));
        assert_near_scaled("projector.mlp_out", &flat, expected, Kind::Activation, largest);
        near("output.image_embeds", &rows);

        // Another grid of patches stretches the positions.
        let wide = io.tensor::<4>("resize.input.pixel_values", &device);
        near("resize.vision.embeddings", &tower.embed(wide));

        let ids: Vec<u32> = io.ints("merge.input_ids").iter().map(|&id| id as u32).collect();
        let flat = rows.clone().reshape([tiles * tokens, hidden]);
        let whole = encoder.forward(pixels.clone());
        assert_eq!(whole.into_data(), flat.clone().into_data(), "{name}: all parts in one");
        let places = placeholders(&ids, images.placeholder);
        let merged = put_in_place(io.tensor("merge.text_embeds", &device), &places, flat);
        near("merge.output", &merged.unwrap());

        let loss = (rows * io.tensor::<3>("loss_coef", &device)).sum();
        let apart = (loss.clone().into_scalar::<f32>() - io.scalar("loss")).abs();
        assert!(apart <= 1e-4, "{name}: loss differs by {apart:e}");
        let grads = loss.backward();
        let mut compared = 0;
        for (path, gradient) in gradients(&encoder, &grads) {
            let source = sources.iter().find(|source| source.path == path).unwrap();
            let expected = assemble(source, &io, "grads.");
            assert_gradient(&format!("{name} {path}"), &device, &gradient, &expected);
            compared += 1;
        }
        assert_eq!(compared, weights_of_images(&weights));
        let expected = io.host("grads.input.pixel_values");
        let expected = TensorData::new(expected.values.clone(), expected.shape.clone());
        let of_pixels = pixels.grad(&grads).unwrap().into_data();
        assert_gradient(&format!("{name} pixels"), &device, &of_pixels, &expected);
    }
}

/// Tensors of tower and projector in the reference's file.
fn weights_of_images(weights: &Fixture) -> usize {
    weights.names().filter(|name| !name.starts_with("language_model.")).count()
}

#[test]
fn the_grid_of_tiles_is_that_of_the_reference() {
    let text = std::fs::read_to_string(reference().join("vision_tiny/tiling.json")).unwrap();
    let tiling: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tile = number(&tiling["image_size"]);
    let cases = tiling["cases"].as_array().unwrap();
    assert!(cases.len() > 30);
    for case in cases {
        let of = |key: &str| number(&case[key]);
        let grid = TileGrid::of(of("width"), of("height"), tile, of("max_num"));
        assert_eq!((grid.columns, grid.rows), (of("cols"), of("rows")), "{case}");
        assert_eq!(grid.tiles(), of("tiles_with_thumbnail"), "{case}");
        let tokens = VisionConfig::intern_vit_300m().tokens_per_tile() * grid.tiles();
        assert_eq!(tokens, of("tokens"), "{case}");
    }
}

#[test]
fn pictures_are_resized_as_pillow_does_it_in_the_reference() {
    let bytes = std::fs::read(reference().join("image_resize/resize.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let picture = |name: String| {
        let tensor = tensors.tensor(&name).unwrap();
        let [height, width, _] = tensor.shape()[..] else { panic!("{name}") };
        Picture::new(width, height, tensor.data().to_vec()).unwrap()
    };
    let count = tensors.names().iter().filter(|name| name.ends_with(".input")).count();
    assert!(count >= 6);
    for number in 0..count {
        let expected = picture(format!("{number}.output"));
        let input = picture(format!("{number}.input"));
        let found = input.resized(expected.width(), expected.height());
        assert!(found == expected, "picture {number}");
        let pixels = tensors.tensor(&format!("{number}.pixels")).unwrap();
        let pixels = pixels.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        for (found, expected) in found.normalised().into_iter().zip(pixels) {
            assert!((found - expected).abs() <= 1e-6, "picture {number}: {found}, {expected}");
        }
    }
    let page = Picture::new(300, 200, vec![7; 300 * 200 * 3]).unwrap();
    let tiles = page.tiles(28, 9);
    let grid = TileGrid::of(300, 200, 28, 9);
    assert_eq!(tiles.len(), grid.tiles());
    assert!(tiles.iter().all(|tile| (tile.width(), tile.height()) == (28, 28)));
    assert_eq!(Picture::new(0, 5, Vec::new()), None);
    assert_eq!(Picture::new(usize::MAX, 2, vec![0; 6]), None);
}

/// Which pass comes first decides how values round.
#[test]
fn both_orders_of_the_passes_round_as_in_pillow() {
    let path = fixtures().join("image_resize/orders.json");
    let orders: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = orders["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 6);
    for case in cases {
        let [width, height] = [0, 1].map(|side| number(&case["from"][side]));
        let values = (0..height * width * 3).map(|place| {
            let (x, y, channel) = (place / 3 % width, place / 3 / width, place % 3);
            ((37 * x + 91 * y + 53 * channel + 7 * x * y * (channel + 1)) % 256) as u8
        });
        let picture = Picture::new(width, height, values.collect()).unwrap();
        let found = picture.resized(number(&case["to"][0]), number(&case["to"][1]));
        let expected = case["values"].as_array().unwrap().iter().map(number);
        assert!(
            found.values().iter().map(|&value| usize::from(value)).eq(expected),
            "{} to {}",
            case["from"],
            case["to"]
        );
    }
}

#[test]
fn norms_and_missing_rows_are_as_the_configuration_and_the_text_say() {
    let vision = configs().1.tower;
    let device = burn::tensor::Device::flex();
    let config = VisionConfig {
        norm_type: VisionNormType::RmsNorm,
        qk_normalization: true,
        qkv_bias: false,
        ..vision
    };
    let tower = VisionTower::new(&config, &device).unwrap();
    let parameters = yuan_model::named::parameter_names(&tower);
    let count: usize = parameters.iter().map(|name| name.shape.num_elements()).sum();
    assert_eq!(count as u64, config.parameters());
    let tiles = Tensor::<4>::ones([1, 3, 28, 28], &device);
    let output = tower.forward(tiles).into_data();
    assert!(output.iter::<f32>().all(f32::is_finite));

    let (text, rows) = (Tensor::zeros([1, 3, 4], &device), Tensor::zeros([2, 4], &device));
    let refused = put_in_place(text, &placeholders(&[7, 5, 9], 5), rows).unwrap_err();
    assert!(matches!(refused, ModelError::ImageRows { placeholders: 1, rows: 2 }));
    assert_eq!(refused.to_string(), "the text has 1 places for image rows, but there are 2");
}
