#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod applet;
pub mod card;
pub mod keys;
pub mod pin;
pub mod shell;
pub mod state;
mod tlv;
