//! The reader as a redirected USB device: the device owner's side of usbredir 0.7, as QEMU's `usb-redir` device
//! and libvirt's `<redirdev>` speak it.
//!
//! [`Session`] is one device's session with a guest, as a state machine: bytes and events in, bytes and events
//! out; it does no I/O and reads no clock. The [`Device`](crate::Device) is lent to it with each call, since cards
//! work for it at the same time: whoever holds both tells the session with [`Input::DeviceReady`] when the device
//! may have something for the guest.
//!
//! * **A session ends with its connection**, and nothing disturbs it before. Another VMM waits until its hello is whole,
//!   and is refused if the one that has the device does not show within three seconds that it is gone. QEMU says hello
//!   when its virtual machine runs, which may be hours later, so nobody is refused for silence, unless too many wait.
//! * **A guest that migrates takes its session along** only if the session [may](Session::migrating): whoever goes on
//!   with it is not asked who it is. It goes on, on a connection from another QEMU that was there before, as if nothing
//!   had happened: no hello, packets in the form agreed on before, even the rest of a half one. The connection before is
//!   gone by then, or its QEMU reads no more, which shows that its virtual machine has stopped; silence shows nothing.
//! * **Every transfer is answered once.** An IN transfer waits until there is data (usbredir has no NAK), until it
//!   is cancelled, or until the device is reset or leaves, which answers it as cancelled.
//! * **An answer that crossed its cancel is lost** to the guest, since QEMU drops it; so the last answers are kept,
//!   and one that is cancelled after all goes back to the device.
//! * **A session that goes on repeats** what was sent since the last sign of life on the connection before: the
//!   QEMU that stopped may have left it unread. QEMU drops an answer that it does not wait for. What a key gave is not
//!   repeated after the PIN was forgotten.

mod codec;
mod endpoint;
mod session;
#[cfg(test)]
mod tests;
mod unread;
mod waiting;

pub use codec::{DecodeError, PacketType};
pub use session::{CloseReason, ConnectionId, Input, Notice, Output, Session};
