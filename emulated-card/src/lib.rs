#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod applet;
pub mod card;
#[cfg(all(unix, feature = "nss"))]
pub mod certificates;
pub mod keys;
pub mod pin;
pub mod shell;
pub mod state;
mod tlv;
#[cfg(all(unix, feature = "nss"))]
pub mod token;
