//! A connection after a device was imported: transfers.
//!
//! A transfer is answered once and only once. What can be answered at once (all of control and OUT) is; IN
//! transfers wait, in order, until the device has something for their endpoint. One that is taken back while it
//! waits is answered by the RET_UNLINK alone; one that was answered before has lost the race, which is what the
//! status 0 of its RET_UNLINK says, and its data is the client's to keep or to drop.
//!
//! The protocol has no bus reset. A client's kernel that resets a device or takes a new one configures it, so
//! SET_CONFIGURATION is taken for the reset: cards are powered down, a verified PIN does not survive.

use std::collections::VecDeque;
use std::time::Instant;

use thiserror::Error;
use vscard_protocol::Secret;

use super::codec::{self, Command, DecodeError, Decoder, Direction, MAX_TRANSFER, Submit, Unlink};
use super::management::Export;
use crate::descriptor::EndpointKind;
use crate::device::{ControlOutcome, Device, InOutcome, Setup, TransferOutcome};

/// IN transfers that may wait on one endpoint.
const MOST_WAITING: usize = 64;
/// Bytes of answers that may wait to be written; above what all the transfers of one endpoint can bring.
const MOST_UNREAD: usize = 8 << 20;
/// Transfers that make no sense before the connection is given up.
const MOST_NONSENSE: u32 = 64;
/// bmRequestType and bRequest (USB 2.0 §9.4.7).
const SET_CONFIGURATION: (u8, u8) = (0x00, 9);
/// Endpoint numbers a device may have, 0 among them.
const ENDPOINTS: usize = 16;

/// Linux' numbers for what became of a transfer.
mod status {
    pub(super) const OK: i32 = 0;
    pub(super) const NO_DEVICE: i32 = -19;
    pub(super) const STALL: i32 = -32;
    pub(super) const PROTOCOL: i32 = -71;
    pub(super) const OVERFLOW: i32 = -75;
    pub(super) const UNLINKED: i32 = -104;
    pub(super) const SHUTDOWN: i32 = -108;
}

/// What happens to a [`Urbs`].
pub enum Input<'a> {
    /// Bytes from the client.
    Received(&'a [u8]),
    /// The device may have something for an IN endpoint.
    DeviceReady,
    /// Somebody else wants the device. What is sent now, the client's kernel ignores; but if its machine was reset
    /// meanwhile, it knows the connection no more and resets that.
    AskPeer,
    /// The stream has ended. The device is reset; there is no output.
    Gone,
}

/// What a [`Urbs`] wants done.
#[derive(Debug)]
pub enum Output {
    /// Write these bytes, in one piece.
    Send(Secret),
    /// Tell the user.
    Notice(Notice),
    /// Write what is to be written, then close the stream. The device has been reset. Nothing comes after this.
    Close(CloseReason),
}

/// A transfer that makes no sense, and was answered so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Notice {
    /// For another device than the one imported.
    #[error("transfer {seqnum} is for device {devid:#x}, which was not imported on this connection")]
    WrongDevice {
        /// Sequence number of the SUBMIT.
        seqnum: u32,
        /// The device it names.
        devid: u32,
    },
    /// For an endpoint that the device does not have.
    #[error("transfer {seqnum} is for endpoint {endpoint} {direction}, which does not exist")]
    UnknownEndpoint {
        /// Sequence number of the SUBMIT.
        seqnum: u32,
        /// Number of the endpoint.
        endpoint: u32,
        /// `IN` or `OUT`.
        direction: &'static str,
    },
    /// An IN transfer of a negative length.
    #[error("transfer_buffer_length at offset 0x18 of SUBMIT {seqnum} is negative")]
    NegativeLength {
        /// Sequence number of the SUBMIT.
        seqnum: u32,
    },
    /// A control transfer whose header and setup packet say different things about its data.
    #[error("the setup packet at offset 0x28 of SUBMIT {seqnum} disagrees with its direction or length")]
    BadSetup {
        /// Sequence number of the SUBMIT.
        seqnum: u32,
    },
}

/// Why a connection ends by our will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CloseReason {
    /// The stream cannot be followed.
    #[error("cannot follow the client: {0}")]
    Decode(DecodeError),
    /// A sequence number came again while its transfer was waiting: no answer could say which one is meant.
    #[error("sequence number {0} used again while its transfer is waiting")]
    DuplicateSeqnum(u32),
    /// The client submits without end.
    #[error("more than {MOST_WAITING} transfers are waiting on endpoint {0} IN")]
    TooManyWaiting(u8),
    /// The client does not read.
    #[error("more than {MOST_UNREAD} bytes of answers are waiting for the client to read them")]
    TooMuchUnread,
    /// The client keeps sending what no kernel sends.
    #[error("the client has sent more than {MOST_NONSENSE} transfers that make no sense")]
    TooMuchNonsense,
}

/// An IN transfer that waits for the device.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    seqnum: u32,
    /// What was asked for, at most [`MAX_TRANSFER`].
    length: usize,
    packets: u32,
}

/// One connection's transfers to the device it imported.
///
/// After every input the output is to be polled until there is none, and written, before more is received: that is
/// what keeps a client that does not read from being served on.
pub struct Urbs {
    devid: u32,
    decoder: Decoder,
    output: VecDeque<Output>,
    /// Bytes in `output`.
    unread: usize,
    /// By endpoint number, OUT and IN.
    kinds: [[Option<EndpointKind>; ENDPOINTS]; 2],
    /// By endpoint number.
    waiting: [VecDeque<Waiting>; ENDPOINTS],
    nonsense: u32,
    closed: bool,
}

impl Urbs {
    /// The rest of a connection on which `export` was imported.
    pub fn new(export: &Export) -> Self {
        let mut kinds = [[None; ENDPOINTS]; 2];
        for endpoint in export.endpoints() {
            let direction = usize::from(endpoint.address >> 7);
            let number = usize::from(endpoint.address & 0x0F);
            kinds[direction][number] = Some(endpoint.kind);
        }
        Self {
            devid: export.devid(),
            decoder: Decoder::default(),
            output: VecDeque::new(),
            unread: 0,
            kinds,
            waiting: Default::default(),
            nonsense: 0,
            closed: false,
        }
    }

    /// Takes what happened at `now`. Nothing but this may move the data endpoints of `device` while the connection
    /// lasts.
    pub fn handle(&mut self, input: Input<'_>, device: &mut Device, now: Instant) {
        match input {
            _ if self.closed => {}
            Input::Received(bytes) => self.received(bytes, device, now),
            Input::DeviceReady => self.serve(device),
            // The protocol has no message that asks. `vhci-hcd` counts its commands from 1, and leaves it at a line
            // in its log when a RET_UNLINK answers none; any other reply that it does not expect ends the connection.
            Input::AskPeer => self.send(codec::ret_unlink(0, status::OK)),
            Input::Gone => self.end(device, now),
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        let output = self.output.pop_front()?;
        if let Output::Send(bytes) = &output {
            self.unread -= bytes.len();
        }
        Some(output)
    }

    fn received(&mut self, mut bytes: &[u8], device: &mut Device, now: Instant) {
        while let Some(command) = self.decoder.decode(&mut bytes) {
            let done = match command {
                Ok(Command::Submit(submit)) => self.submit(submit, device, now),
                Ok(Command::Unlink(unlink)) => self.unlink(&unlink),
                Err(error) => Err(CloseReason::Decode(error)),
            };
            self.serve(device);
            let done = match done {
                Ok(()) if self.unread > MOST_UNREAD => Err(CloseReason::TooMuchUnread),
                Ok(()) if self.nonsense > MOST_NONSENSE => Err(CloseReason::TooMuchNonsense),
                done => done,
            };
            if let Err(reason) = done {
                self.end(device, now);
                return self.output.push_back(Output::Close(reason));
            }
        }
    }

    /// A client that is gone has unplugged the device.
    fn end(&mut self, device: &mut Device, now: Instant) {
        self.closed = true;
        self.waiting.iter_mut().for_each(VecDeque::clear);
        device.reset(now);
    }

    // ---- commands ---------------------------------------------------------------------------------------

    fn submit(&mut self, submit: Submit, device: &mut Device, now: Instant) -> Result<(), CloseReason> {
        let Submit { seqnum, devid, endpoint, .. } = submit;
        self.check_seqnum(seqnum)?;
        if devid != self.devid {
            self.nonsense(Notice::WrongDevice { seqnum, devid });
            self.fail(&submit, status::NO_DEVICE);
            return Ok(());
        }
        if submit.direction == Direction::In && i32::try_from(submit.length).is_err() {
            self.nonsense(Notice::NegativeLength { seqnum });
            self.fail(&submit, status::PROTOCOL);
            return Ok(());
        }
        let direction = submit.direction;
        let number = endpoint as usize;
        match self.kinds[direction as usize].get(number).copied().flatten() {
            _ if number == 0 => self.control(&submit, device, now),
            Some(_) if direction == Direction::Out => self.data_out(&submit, device, now),
            Some(_) => self.wait(&submit)?,
            None => {
                let direction = if direction == Direction::In { "IN" } else { "OUT" };
                self.nonsense(Notice::UnknownEndpoint { seqnum, endpoint, direction });
                self.fail(&submit, status::PROTOCOL);
            }
        }
        Ok(())
    }

    fn control(&mut self, submit: &Submit, device: &mut Device, now: Instant) {
        let [request_type, request, v0, v1, i0, i1, l0, l1] = submit.setup;
        // The setup packet is as on the bus, little endian.
        let [value, index, length] = [[v0, v1], [i0, i1], [l0, l1]].map(u16::from_le_bytes);
        let setup = Setup { request_type, request, value, index, length };
        let is_in = request_type & 0x80 != 0;
        // Without a data stage the direction means nothing.
        let agree = match submit.direction {
            Direction::Out => submit.length == u32::from(length) && (!is_in || length == 0),
            Direction::In => is_in || length == 0,
        };
        if !agree {
            self.nonsense(Notice::BadSetup { seqnum: submit.seqnum });
            return self.fail(submit, status::PROTOCOL);
        }
        let outcome = device.control(setup, submit.data.expose(), now);
        if (request_type, request) == SET_CONFIGURATION && outcome != ControlOutcome::Stall {
            // The device has reset itself. What waited before that may not see what comes after it.
            for urb in self.waiting.iter_mut().flat_map(std::mem::take).collect::<Vec<_>>() {
                self.reply(urb, status::SHUTDOWN, &[]);
            }
        }
        match outcome {
            ControlOutcome::Stall => self.fail(submit, status::STALL),
            ControlOutcome::Done(data) if submit.direction == Direction::In => {
                let urb = Waiting::from(submit);
                self.reply(urb, status::OK, data.get(..urb.length).unwrap_or(&data));
            }
            ControlOutcome::Done(_) => self.accept(submit),
        }
    }

    fn data_out(&mut self, submit: &Submit, device: &mut Device, now: Instant) {
        // Below 16, or there would be no such endpoint.
        match device.bulk_out(submit.endpoint as u8, submit.data.expose(), now) {
            TransferOutcome::Accepted => self.accept(submit),
            TransferOutcome::Stall => self.fail(submit, status::STALL),
        }
    }

    fn wait(&mut self, submit: &Submit) -> Result<(), CloseReason> {
        let waiting = &mut self.waiting[submit.endpoint as usize];
        if waiting.len() == MOST_WAITING {
            return Err(CloseReason::TooManyWaiting(submit.endpoint as u8));
        }
        waiting.push_back(Waiting::from(submit));
        Ok(())
    }

    fn unlink(&mut self, unlink: &Unlink) -> Result<(), CloseReason> {
        self.check_seqnum(unlink.seqnum)?;
        // By sequence number alone: to leave a transfer waiting that the client believes gone would be answered by
        // the loss of the connection, and there is but one device on it.
        let found = self.waiting.iter_mut().find_map(|waiting| {
            let at = waiting.iter().position(|urb| urb.seqnum == unlink.target)?;
            waiting.remove(at)
        });
        let status = if found.is_some() { status::UNLINKED } else { status::OK };
        self.send(codec::ret_unlink(unlink.seqnum, status));
        Ok(())
    }

    /// A number that is waiting cannot be used for anything else; one that was answered is free again.
    fn check_seqnum(&self, seqnum: u32) -> Result<(), CloseReason> {
        match self.waiting.iter().flatten().any(|urb| urb.seqnum == seqnum) {
            true => Err(CloseReason::DuplicateSeqnum(seqnum)),
            false => Ok(()),
        }
    }

    // ---- answers ----------------------------------------------------------------------------------------

    /// Answers what waits, as far as the device has something for it.
    fn serve(&mut self, device: &mut Device) {
        for number in 1..ENDPOINTS {
            let address = 0x80 | number as u8;
            while let Some(&urb) = self.waiting[number].front() {
                let interrupt = self.kinds[Direction::In as usize][number] == Some(EndpointKind::Interrupt);
                let outcome = match interrupt {
                    true => device.interrupt_in(address),
                    false => device.bulk_in(address, urb.length),
                };
                match outcome {
                    InOutcome::Nothing => break,
                    InOutcome::Stall => self.reply(urb, status::STALL, &[]),
                    InOutcome::Data(data) if data.len() <= urb.length => {
                        self.reply(urb, status::OK, data.expose())
                    }
                    // Babble, as only an interrupt transfer has it. More than was asked for would cost the client
                    // its connection, a part of it would be taken for all.
                    InOutcome::Data(_) => {
                        device.interrupt_in_return(address);
                        self.reply(urb, status::OVERFLOW, &[]);
                    }
                }
                self.waiting[number].pop_front();
            }
        }
    }

    fn reply(&mut self, urb: Waiting, status: i32, data: &[u8]) {
        // At most MAX_TRANSFER.
        let length = data.len() as u32;
        self.send(codec::ret_submit(urb.seqnum, status, length, urb.packets, data));
    }

    fn accept(&mut self, submit: &Submit) {
        let length = submit.data.len() as u32;
        self.send(codec::ret_submit(submit.seqnum, status::OK, length, submit.packets, &[]));
    }

    fn fail(&mut self, submit: &Submit, status: i32) {
        self.send(codec::ret_submit(submit.seqnum, status, 0, submit.packets, &[]));
    }

    fn send(&mut self, bytes: Secret) {
        self.unread += bytes.len();
        self.output.push_back(Output::Send(bytes));
    }

    fn nonsense(&mut self, notice: Notice) {
        self.nonsense += 1;
        self.output.push_back(Output::Notice(notice));
    }
}

impl From<&Submit> for Waiting {
    fn from(submit: &Submit) -> Self {
        let length = usize::try_from(submit.length).unwrap_or(MAX_TRANSFER).min(MAX_TRANSFER);
        Self { seqnum: submit.seqnum, length, packets: submit.packets }
    }
}
