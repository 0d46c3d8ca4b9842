#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod applet;
pub mod card;
pub mod keys;
#[cfg(feature = "pcsc")]
pub mod pcsc;
pub mod pin;
#[cfg(all(unix, feature = "process"))]
pub mod process;
#[cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
pub mod setup;
pub mod shell;
pub mod slot;
pub mod state;
mod tlv;
#[cfg(all(unix, feature = "nss"))]
pub mod token;
pub mod tries;
