#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod applet;
pub mod card;
#[cfg(all(unix, feature = "nss"))]
pub mod certificates;
pub mod keys;
#[cfg(feature = "pcsc")]
pub mod pcsc;
pub mod pin;
pub mod shell;
pub mod slot;
pub mod state;
mod tlv;
pub mod tries;
