#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod descriptor;
mod device;
mod message;
mod pipe;
#[cfg(all(unix, feature = "reader"))]
pub mod reader;
mod slot;
mod snapshot;
pub mod usbip;
pub mod usbredir;

pub use config::{ConfigError, DeviceConfig, Layout, Speed};
pub use descriptor::{Endpoint, EndpointKind, Interface, Topology};
pub use device::{
    Action, CardFailure, ControlOutcome, Device, InOutcome, Outcome, Setup, SlotId, Token, TransferOutcome,
};
pub use snapshot::RestoreError;
