//! The device's state as bytes, for a virtual machine that is saved or migrated.
//!
//! A payload is the word `CCID`, a version, what of the configuration the guest relies on, and the state in a
//! fixed order, integers little endian. Whoever wrote it, restoring it gives a device within all its bounds,
//! or an error.

use std::time::Instant;

use thiserror::Error;
use vscard_protocol::{Atr, Response, Secret, Validity, apdu};

use crate::config::{ConfigError, DeviceConfig, Layout, Speed};
use crate::descriptor::CONFIGURATION;
use crate::device::{Device, Function};
use crate::message::{HEADER, Header, Parameters};
use crate::pipe::{Assembler, Item, MOST_ITEMS, Queue};
use crate::slot::{AbortHalf, Card, Context, Slot, Work, refused};

const MAGIC: [u8; 4] = *b"CCID";
const VERSION: u8 = 1;

/// Why there is no device to be made of saved bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// There can be no device of this configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// They are no saved device.
    #[error("this is no saved CCID device")]
    Foreign,
    /// They are of a version that is not known.
    #[error("a CCID device saved in version {0} cannot be read: version {VERSION} is the newest known")]
    Version(u8),
    /// The guest was shown another device than the configuration's.
    #[error("the saved CCID device has another {0}")]
    OtherDevice(&'static str),
    /// A field has a value it cannot have, or is cut short.
    #[error("the saved CCID device is damaged: {field} at offset {offset}")]
    Damaged {
        /// The field.
        field: &'static str,
        /// Where it starts.
        offset: usize,
    },
}

impl Device {
    /// The device's state. It has the bytes of APDUs in it that the guest has not read or sent in full: it is
    /// to be guarded as the guest's memory is.
    ///
    /// What [`bulk_in`](Self::bulk_in) and [`interrupt_in`](Self::interrupt_in) gave and the guest does not
    /// have is to be given back first. The device goes on as if nothing had happened.
    ///
    /// A response with a [`Validity`] is not saved, but the status word 6982 in its place: what it depends on, as a
    /// verified PIN, is not there where the device is restored.
    pub fn save(&self) -> Secret {
        let mut writer = Writer(Secret::from(&MAGIC[..]));
        writer.u8(VERSION);
        writer.identity(&self.config);
        writer.u8(self.configuration);
        writer.bytes(&self.actions.next.to_le_bytes());
        for function in &self.functions {
            writer.function(function);
        }
        writer.0
    }

    /// The device that [`save`](Self::save) made bytes of, shown to the same guest.
    ///
    /// Cards stay where the guest saw them, so the embedder calls [`remove`](Self::remove) for those it no
    /// longer has, and [`insert`](Self::insert) for those it has now and for any that the guest had
    /// better take for another one. Then:
    ///
    /// * For each card that was powered there is an [`Action::PowerOn`](crate::Action::PowerOn). If it
    ///   answers to reset as before, the guest notices nothing but that the PIN is not verified and nothing
    ///   is selected; if not, the guest sees the card removed and inserted.
    /// * A command that was at work may have been done or not, and doing it again could cost a PIN try: the
    ///   guest is told HW_ERROR. A power-on at work is begun again.
    /// * A half of an ABORT still waits for the other, chained commands and responses go on, and answers the
    ///   guest has not read are still there.
    /// * Tokens of the saved device name nothing.
    ///
    /// # Errors
    /// [`RestoreError`] when `config` differs in what the guest relies on, or `saved` is no saved device.
    pub fn restore(config: DeviceConfig, saved: &[u8], now: Instant) -> Result<Self, RestoreError> {
        let mut device = Self::new(config)?;
        let mut reader = Reader { rest: saved, offset: 0 };
        if reader.array::<4>("magic").map_err(|_| RestoreError::Foreign)? != MAGIC {
            return Err(RestoreError::Foreign);
        }
        match reader.u8("version")? {
            VERSION => {}
            version => return Err(RestoreError::Version(version)),
        }
        reader.identity(&device.config)?;
        device.configuration =
            reader.checked("configuration", Reader::u8, |&value| value == 0 || value == CONFIGURATION)?;
        device.actions.next = u64::from_le_bytes(reader.array("next token")?);
        let max_message = device.config.max_message as usize;
        let mut works = Vec::new();
        for function in &mut device.functions {
            works.push(reader.function(function, max_message)?);
        }
        if !reader.rest.is_empty() {
            return Err(reader.damaged("bytes after the end"));
        }
        for (function, works) in device.functions.iter_mut().zip(works) {
            let Function { slots, queue, .. } = function;
            let actions = &mut device.actions;
            let mut context = Context { queue, actions, max_data: max_message - HEADER, now };
            for (slot, work) in slots.iter_mut().zip(works) {
                slot.resume(work, &mut context);
            }
        }
        Ok(device)
    }
}

struct Writer(Secret);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    fn u32(&mut self, value: usize) {
        // Nothing here is longer than 65 554.
        self.bytes(&(value as u32).to_le_bytes());
    }

    fn block(&mut self, bytes: &[u8]) {
        self.u32(bytes.len());
        self.bytes(bytes);
    }

    fn optional<T>(&mut self, value: Option<&T>, write: impl FnOnce(&mut Self, &T)) {
        self.u8(value.is_some().into());
        if let Some(value) = value {
            write(self, value);
        }
    }

    fn identity(&mut self, config: &DeviceConfig) {
        self.bytes(&config.vendor_id.to_le_bytes());
        self.bytes(&config.product_id.to_le_bytes());
        self.u8(speed(config.speed));
        self.bytes(&layout(config.layout));
        self.bytes(&config.max_message.to_le_bytes());
    }

    fn function(&mut self, function: &Function) {
        self.bytes(&function.halted.map(u8::from));
        self.bytes(&function.notified.to_le_bytes());
        self.block(function.assembler.gathered.expose());
        self.bytes(&function.assembler.skip.to_le_bytes());
        self.optional(function.queue.ending().as_ref(), |writer, slot| writer.u8(*slot));
        self.u32(function.queue.len());
        for item in function.queue.items() {
            let refused = item.validity.is_limited().then(|| item.refused());
            let item = refused.as_ref().unwrap_or(item);
            self.u8(item.slot);
            self.u8(item.is_whole.into());
            self.u32(item.offset);
            self.block(item.bytes.expose());
        }
        for slot in &function.slots {
            self.slot(slot);
        }
    }

    fn slot(&mut self, slot: &Slot) {
        match &slot.card {
            Card::Absent => self.u8(0),
            Card::Inactive => self.u8(1),
            Card::Active(atr) => {
                self.u8(2);
                self.block(atr.as_bytes());
            }
        }
        self.u8(slot.changed.into());
        self.u8(slot.parameters.protocol);
        self.bytes(&slot.parameters.data);
        self.optional(slot.gathered.as_ref(), |writer, gathered| writer.block(gathered.expose()));
        self.optional(slot.unread.as_ref(), |writer, (response, read)| {
            let refused = response.validity().is_limited().then(|| refused(*read));
            writer.block(refused.as_ref().unwrap_or(response).as_bytes());
            writer.u32(*read);
        });
        self.bytes(&match slot.abort {
            None => [0, 0],
            Some(AbortHalf::Control(seq)) => [1, seq],
            Some(AbortHalf::Bulk(seq)) => [2, seq],
        });
        self.bytes(&match slot.running.as_ref().map(|running| (running.work, running.seq)) {
            None => [0, 0],
            Some((Work::PowerOn, seq)) => [1, seq],
            Some((Work::Transmit, seq)) => [2, seq],
        });
    }
}

fn speed(speed: Speed) -> u8 {
    match speed {
        Speed::Full => 1,
        Speed::High => 2,
    }
}

fn layout(layout: Layout) -> [u8; 2] {
    match layout {
        Layout::Slots(slots) => [1, slots],
        Layout::Interfaces(interfaces) => [2, interfaces],
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    fn damaged(&self, field: &'static str) -> RestoreError {
        RestoreError::Damaged { field, offset: self.offset }
    }

    fn take(&mut self, field: &'static str, count: usize) -> Result<&'a [u8], RestoreError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(self.damaged(field))?;
        self.rest = rest;
        self.offset += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], RestoreError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(field, N)?);
        Ok(array)
    }

    /// What `read` reads, if `fits` likes it.
    fn checked<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&mut Self, &'static str) -> Result<T, RestoreError>,
        fits: impl FnOnce(&T) -> bool,
    ) -> Result<T, RestoreError> {
        let offset = self.offset;
        let value = read(self, field)?;
        if fits(&value) { Ok(value) } else { Err(RestoreError::Damaged { field, offset }) }
    }

    fn u8(&mut self, field: &'static str) -> Result<u8, RestoreError> {
        self.array(field).map(|[value]| value)
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, RestoreError> {
        self.checked(field, Self::u8, |value| *value < 2).map(|value| value == 1)
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, RestoreError> {
        self.array(field).map(u16::from_le_bytes)
    }

    fn u32(&mut self, field: &'static str) -> Result<usize, RestoreError> {
        self.array(field).map(|bytes| u32::from_le_bytes(bytes) as usize)
    }

    /// Bytes with their length in front, `least` to `most` of them.
    fn block(
        &mut self,
        field: &'static str,
        lengths: std::ops::RangeInclusive<usize>,
    ) -> Result<&'a [u8], RestoreError> {
        let length = self.checked(field, Self::u32, |length| lengths.contains(length))?;
        self.take(field, length)
    }

    fn identity(&mut self, config: &DeviceConfig) -> Result<(), RestoreError> {
        let same = |same: bool, field| if same { Ok(()) } else { Err(RestoreError::OtherDevice(field)) };
        same(self.u16("vendor")? == config.vendor_id, "vendor")?;
        same(self.u16("product")? == config.product_id, "product")?;
        same(self.u8("speed")? == speed(config.speed), "speed")?;
        same(self.array("layout")? == layout(config.layout), "layout")?;
        same(self.u32("longest message")? == config.max_message as usize, "longest message")
    }

    /// Fills a function; gives the work that each slot was at, with its bSeq.
    fn function(
        &mut self,
        function: &mut Function,
        max_message: usize,
    ) -> Result<Vec<Option<(Work, u8)>>, RestoreError> {
        let slots = function.slots.len() as u8;
        for halted in &mut function.halted {
            *halted = self.flag("halt")?;
        }
        function.notified =
            self.checked("notified changes", Self::u16, |bits| u32::from(*bits) < 1 << slots)?;
        let gathered = self.checked(
            "bulk-OUT data",
            |reader, field| reader.block(field, 0..=max_message),
            |gathered| {
                // Either nothing, or a header and less than it announces.
                gathered.is_empty()
                    || Header::parse(gathered).is_some_and(|header| {
                        let wanted = HEADER as u64 + u64::from(header.length);
                        wanted > gathered.len() as u64 && wanted <= max_message as u64
                    })
            },
        )?;
        let skip = u64::from_le_bytes(self.array("bulk-OUT data to skip")?);
        function.assembler = Assembler { gathered: gathered.into(), skip };
        let ending = match self.flag("bulk-IN ending")? {
            true => Some(self.checked("bulk-IN ending", Self::u8, |slot| *slot < slots)?),
            false => None,
        };
        let count = self.checked("count of answers", Self::u32, |count| *count <= MOST_ITEMS)?;
        let items = (0..count).map(|_| self.item(slots, max_message)).collect::<Result<_, _>>()?;
        function.queue = Queue::restored(items, ending);
        function.slots.iter_mut().map(|slot| self.slot(slot)).collect()
    }

    fn item(&mut self, slots: u8, max_message: usize) -> Result<Item, RestoreError> {
        let slot = self.checked("slot of an answer", Self::u8, |slot| *slot < slots)?;
        let is_whole = self.flag("whole answer")?;
        let offset = self.checked("answer read", Self::u32, |offset| *offset < max_message)?;
        let bytes = self.checked(
            "answer",
            |reader, field| reader.block(field, offset + 1..=max_message),
            |bytes| {
                !is_whole
                    || Header::parse(bytes).is_some_and(|header| {
                        (0x80..=0x84).contains(&header.kind.0)
                            && header.slot == slot
                            && bytes.len() as u64 == HEADER as u64 + u64::from(header.length)
                    })
            },
        )?;
        Ok(Item { slot, bytes: bytes.into(), offset, is_whole, validity: Validity::default() })
    }

    fn slot(&mut self, slot: &mut Slot) -> Result<Option<(Work, u8)>, RestoreError> {
        slot.card = match self.checked("card", Self::u8, |card| *card < 3)? {
            0 => Card::Absent,
            1 => Card::Inactive,
            _ => Card::Active(Atr::from_card(self.block("ATR", 0..=vscard_protocol::atr::MAX_ATR)?)),
        };
        let active = matches!(slot.card, Card::Active(_));
        slot.changed = self.flag("change")?;
        let protocol = self.checked("protocol", Self::u8, |protocol| *protocol < 2)?;
        slot.parameters = Parameters { protocol, data: self.array("parameters")? };
        slot.gathered = match self.checked("parts of a command", Self::flag, |some| active || !some)? {
            true => Some(Secret::from(self.block("parts of a command", 0..=apdu::MAX_COMMAND)?)),
            false => None,
        };
        slot.unread = match self.checked("response", Self::flag, |some| active || !some)? {
            true => {
                let offset = self.offset;
                let response = Response::parse(self.block("response", 2..=apdu::MAX_RESPONSE)?);
                let response = response.map_err(|_| RestoreError::Damaged { field: "response", offset })?;
                let length = response.as_bytes().len();
                let read = self.checked("response read", Self::u32, |read| (1..length).contains(read))?;
                Some((response, read))
            }
            false => None,
        };
        slot.abort = match self.checked("ABORT", Self::array, |&[half, _]| half < 3)? {
            [1, seq] => Some(AbortHalf::Control(seq)),
            [2, seq] => Some(AbortHalf::Bulk(seq)),
            _ => None,
        };
        let work = self.checked("command at work", Self::array, |&[work, _]| match work {
            0 => true,
            1 => slot.card == Card::Inactive,
            2 => active,
            _ => false,
        })?;
        Ok(match work {
            [1, seq] => Some((Work::PowerOn, seq)),
            [2, seq] => Some((Work::Transmit, seq)),
            _ => None,
        })
    }
}
