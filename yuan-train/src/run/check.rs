//! Whether settings, model and devices fit each other: found out before a run, not in the middle of
//! it.

use yuan_model::{DeviceMesh, MeshModel, YuanConfig};

use crate::{TrainConfig, TrainError, Trigger};

/// Checks settings and model together, so that nothing is found out in the middle of the run.
///
/// # Errors
///
/// Names the setting that is out of range or does not fit the model.
pub fn check_settings(config: &TrainConfig, model: &YuanConfig) -> Result<(), TrainError> {
    config.validate()?;
    if config.bias_update_rate.is_some() && !model.router_selection_bias {
        return Err(TrainError::NoSelectionBias);
    }
    let (experts, top_k) = (&model.experts_per_layer, model.top_k);
    let laep = &config.laep;
    if let Some(plan) = &laep.plan {
        plan.check_against(experts, top_k)?;
    }
    let is_planned = laep.trigger != Trigger::Never && laep.plan.is_none();
    if is_planned || laep.rearrange_every.is_some() {
        laep.limits.check_model(experts, top_k)?;
    }
    Ok(())
}

/// Checks that rows, experts and groups can be spread over the devices of a mesh.
///
/// # Errors
///
/// Names what cannot.
pub fn check_mesh(
    config: &TrainConfig,
    model: &YuanConfig,
    mesh: &DeviceMesh,
) -> Result<(), TrainError> {
    let (rows, devices) = (config.batch_size, mesh.devices().len());
    if !rows.is_multiple_of(devices) {
        return Err(TrainError::UnevenBatch { rows, devices });
    }
    MeshModel::check(model, mesh)?;
    let (groups, devices) = (config.laep.groups, mesh.expert());
    let is_spread = config.laep.trigger != Trigger::Never || config.laep.rearrange_every.is_some();
    if is_spread && !groups.is_multiple_of(devices) {
        return Err(TrainError::UnevenGroups { groups, devices });
    }
    Ok(())
}
