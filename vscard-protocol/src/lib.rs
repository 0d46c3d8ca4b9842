#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod apdu;
pub mod atr;
#[cfg(feature = "source")]
mod card;
#[cfg(all(unix, feature = "io"))]
pub mod chardev;
pub mod client;
pub mod codec;
pub mod host;
#[cfg(any(feature = "source", feature = "io"))]
mod lines;
pub mod message;
#[cfg(all(unix, feature = "io", feature = "source"))]
pub mod passthru;
mod secret;
#[cfg(feature = "source")]
mod t0;
#[cfg(feature = "trace")]
pub mod trace;
mod validity;

pub use apdu::{Case, Command, CommandError, Response, ResponseError, StatusWord};
pub use atr::Atr;
#[cfg(feature = "source")]
pub use card::{Card, CardError, CardSource, Limits, Presence, PresenceWatch};
#[cfg(any(feature = "source", feature = "io"))]
pub use lines::LogBudget;
pub use secret::Secret;
#[cfg(feature = "source")]
pub use t0::T0;
pub use validity::Validity;
