//! USB/IP, version 1.1.1: a [`Device`](crate::Device) exported to the `vhci-hcd` of a Linux kernel.
//!
//! A connection has two phases, each a state machine that does no I/O and reads no clock:
//!
//! 1. [`Management`]: the client asks for the list of devices, after which the connection ends, or imports one.
//! 2. [`Urbs`]: the client's kernel submits transfers to the imported device and takes them back. There is one
//!    connection per device; its end is the device being unplugged.
//!
//! What belongs to both connections and devices, which device is imported by whom, is the caller's: it keeps one
//! [`Export`] per device, marks it when [`management::Output::Import`] comes, before another connection is
//! looked at, and unmarks it when that connection has ended. A machine that was reset leaves its connection open,
//! so a device that is wanted by another client is asked for: [`management::Output::Ask`].
//!
//! The protocol has neither authentication nor encryption: whoever may connect, may use the card.
//!
//! ```
//! use std::time::Instant;
//! use ccid_device::usbip::{Export, Management, Urbs, management, urbs};
//! use ccid_device::{Device, DeviceConfig};
//!
//! # fn main() -> Result<(), ccid_device::ConfigError> {
//! let mut device = Device::new(DeviceConfig::new("vm1"))?;
//! let mut exports = [Export::new(1, device.topology())];
//! let now = Instant::now();
//!
//! // `usbip attach -b 1-1`: OP_REQ_IMPORT, and the kernel's first transfer, GET_STATUS.
//! let mut stream = vec![0x01, 0x11, 0x80, 0x03, 0, 0, 0, 0, b'1', b'-', b'1'];
//! stream.resize(40, 0);
//! for word in [1, 100, 0x0001_0001, 1, 0, 0x200, 2, 0, 0, 0] {
//!     stream.extend_from_slice(&u32::to_be_bytes(word));
//! }
//! stream.extend_from_slice(&[0x80, 0, 0, 0, 0, 0, 2, 0]);
//!
//! let mut received = &stream[..];
//! let mut connection = Management::new(now);
//! connection.handle(&mut received, &exports, now);
//! assert!(matches!(connection.poll_output(), Some(management::Output::Send(reply)) if reply.len() == 8 + 312));
//! assert_eq!(connection.poll_output(), Some(management::Output::Import(0)));
//!
//! exports[0].set_imported(true);
//! let mut connection = Urbs::new(&exports[0]);
//! connection.handle(urbs::Input::Received(received), &mut device, now);
//! assert!(matches!(connection.poll_output(), Some(urbs::Output::Send(reply)) if reply.len() == 48 + 2));
//!
//! connection.handle(urbs::Input::Gone, &mut device, now);
//! exports[0].set_imported(false);
//! # Ok(())
//! # }
//! ```

mod codec;
pub mod management;
#[cfg(test)]
mod tests;
pub mod urbs;

pub use codec::DecodeError;
pub use management::{Export, Management};
pub use urbs::Urbs;
