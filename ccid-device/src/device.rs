//! The device: control requests, pipes, and what the embedder is asked to do.

use std::collections::VecDeque;
use std::time::Instant;

use vscard_protocol::{Atr, Command, Response, Secret, Validity};

use crate::config::{ConfigError, DeviceConfig};
use crate::descriptor::{self, CLOCK_KHZ, CONFIGURATION, DATA_RATES, Pipe, Topology};
use crate::message::{ErrorCode, HEADER, IccStatus, Parameters, failure};
use crate::pipe::{Assembled, Assembler, MOST_ANSWERS, MOST_BYTES, Queue, SMALLEST_PACKET};
use crate::slot::{Context, Slot};

/// Names a slot of a device: 0 and up over all its interfaces.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct SlotId(pub u8);

/// Names an [`Action`] until it is [completed](Device::complete). No two actions of a device share one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token(pub(crate) u64);

/// The setup packet of a control transfer (USB 2.0 §9.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Setup {
    /// bmRequestType.
    pub request_type: u8,
    /// bRequest.
    pub request: u8,
    /// wValue.
    pub value: u16,
    /// wIndex.
    pub index: u16,
    /// wLength.
    pub length: u16,
}

/// How a control transfer ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ControlOutcome {
    /// It succeeds, with this IN data; empty if it has none.
    Done(Vec<u8>),
    /// STALL: the request is not supported (USB 2.0 §9.2.7).
    Stall,
}

/// How an OUT transfer ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TransferOutcome {
    /// All of it was taken.
    Accepted,
    /// STALL: the endpoint is halted, or there is none.
    Stall,
}

/// What an IN endpoint has to say.
#[derive(Debug)]
pub enum InOutcome {
    /// The transfer ends with this; it may be empty.
    Data(Secret),
    /// NAK. The transfer stays; ask again when [`Device::in_ready`] says so.
    Nothing,
    /// STALL: the endpoint is halted, or there is none.
    Stall,
}

/// What the embedder has to do with its cards. Actions on one slot are to be done in the order they come.
///
/// A card that is slow need not hold up the device: the embedder goes on with other slots, and may find that
/// a later action on the same slot made the answer useless. It is completed all the same, or not at all.
#[derive(Debug)]
pub enum Action {
    /// Power the card up, then [complete](Device::complete) it with [`Outcome::Powered`].
    PowerOn {
        /// Names the action.
        token: Token,
        /// Whose card.
        slot: SlotId,
    },
    /// End the card's session: nothing volatile (a verified PIN, a selection) may be left of it. The guest
    /// powered the card off or is about to power it on again, or the device was reset or configured. Not
    /// completed.
    PowerOff {
        /// Whose card.
        slot: SlotId,
    },
    /// Give the card a command, then [complete](Device::complete) it with [`Outcome::Response`].
    Transmit {
        /// Names the action.
        token: Token,
        /// Whose card.
        slot: SlotId,
        /// The command. Bytes that are none are answered by the device, with the status word 6700.
        command: Command,
    },
}

impl Action {
    /// Whose card.
    pub fn slot(&self) -> SlotId {
        match *self {
            Self::PowerOn { slot, .. } | Self::PowerOff { slot } | Self::Transmit { slot, .. } => slot,
        }
    }
}

/// What an action came to.
#[derive(Debug)]
pub enum Outcome {
    /// To [`Action::PowerOn`]: the card's answer to reset.
    Powered(Atr),
    /// To [`Action::Transmit`]: the card's response. A status word that tells of an error is a response, too.
    Response(Response),
    /// To either.
    Failed(CardFailure),
}

/// Why there is no response.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CardFailure {
    /// The card is no longer in. The guest is told ICC_MUTE; [`Device::remove`] tells it the rest.
    Removed,
    /// The card did not answer in time: ICC_MUTE.
    Mute,
    /// Another session has the card: BUSY_WITH_AUTO_SEQUENCE.
    Busy,
    /// Anything else: HW_ERROR.
    Hardware,
}

/// A CCID reader on a USB, as a state machine. See the [crate](crate).
#[derive(Debug)]
pub struct Device {
    pub(crate) config: DeviceConfig,
    /// bConfigurationValue, or 0.
    pub(crate) configuration: u8,
    pub(crate) functions: Vec<Function>,
    pub(crate) actions: Actions,
}

/// One interface.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) slots: Vec<Slot>,
    pub(crate) assembler: Assembler,
    pub(crate) queue: Queue,
    /// The Halt feature of each [`Pipe`].
    pub(crate) halted: [bool; 3],
    /// The slots whose change the last notification told, a bit each.
    pub(crate) notified: u16,
}

/// What was not polled yet: at most a power-off and one other action for each slot.
#[derive(Debug)]
pub(crate) struct Actions {
    queue: VecDeque<Action>,
    /// The next token.
    pub(crate) next: u64,
}

impl Device {
    /// A device that was just plugged in, with no card in any slot.
    ///
    /// # Errors
    /// [`ConfigError`] when there can be no such device.
    pub fn new(config: DeviceConfig) -> Result<Self, ConfigError> {
        config.check()?;
        let (interfaces, slots) = descriptor::shape(config.layout);
        let functions = (0..interfaces)
            .map(|interface| Function {
                slots: (0..slots).map(|slot| Slot::new(SlotId(interface * slots + slot), slot)).collect(),
                assembler: Assembler::default(),
                queue: Queue::default(),
                halted: [false; 3],
                notified: 0,
            })
            .collect();
        let actions = Actions { queue: VecDeque::new(), next: 0 };
        Ok(Self { config, configuration: 0, functions, actions })
    }

    /// What its descriptors say, for a carrier that tells it in messages of its own.
    pub fn topology(&self) -> Topology {
        descriptor::topology(&self.config)
    }

    /// The configuration the guest chose; 0 when none.
    pub fn configuration(&self) -> u8 {
        self.configuration
    }

    /// Its slots, in order.
    pub fn slots(&self) -> impl Iterator<Item = SlotId> + use<> {
        (0..self.config.layout.slots()).map(SlotId)
    }

    // ---- the guest's side -------------------------------------------------------------------------------

    /// A control transfer: the standard requests (USB 2.0 §9.4), and ABORT, GET_CLOCK_FREQUENCIES and
    /// GET_DATA_RATES (USB CCID 1.1 §5.3). `data` is what came with an OUT request.
    ///
    /// SET_CONFIGURATION, also of the configuration that is set, ends all that was going on, as a
    /// [reset](Self::reset) does; SET_INTERFACE does so for the interface's slots.
    pub fn control(&mut self, setup: Setup, data: &[u8], now: Instant) -> ControlOutcome {
        match self.request(setup, data, now) {
            Some(mut answer) => {
                answer.truncate(setup.length.into());
                ControlOutcome::Done(answer)
            }
            None => ControlOutcome::Stall,
        }
    }

    /// The answer to a request; `None` if it is not supported.
    fn request(&mut self, setup: Setup, data: &[u8], now: Instant) -> Option<Vec<u8>> {
        let Setup { request_type, request, value, index, length } = setup;
        let [value_low, value_high] = value.to_le_bytes();
        // No OUT request that is supported has data.
        if request_type & 0x80 == 0 && (length > 0 || !data.is_empty()) {
            return None;
        }
        match (request_type, request) {
            (0x80, standard::GET_STATUS) => Some(vec![0, 0]),
            (0x80, standard::GET_DESCRIPTOR) => descriptor::descriptor(&self.config, value_high, value_low),
            (0x80, standard::GET_CONFIGURATION) => Some(vec![self.configuration]),
            // Addresses are between the carrier and the host controller.
            (0x00, standard::SET_ADDRESS) => Some(Vec::new()),
            (0x00, standard::SET_CONFIGURATION) if value == 0 || value == u16::from(CONFIGURATION) => {
                self.configure(value_low);
                Some(Vec::new())
            }
            (0x81, standard::GET_STATUS) => self.interface(index).map(|_| vec![0, 0]),
            (0x81, standard::GET_INTERFACE) => self.interface(index).map(|_| vec![0]),
            (0x01, standard::SET_INTERFACE) if value == 0 => {
                self.interface(index)?;
                let function = self.functions.get_mut(usize::from(index))?;
                function.reset(&mut self.actions);
                Some(Vec::new())
            }
            // Endpoint 0 is never halted.
            (0x82, standard::GET_STATUS) if matches!(index, 0x00 | 0x80) => Some(vec![0, 0]),
            (0x82, standard::GET_STATUS) => {
                let (function, pipe) = self.find(u8::try_from(index).ok()?)?;
                Some(vec![function.halted[pipe as usize].into(), 0])
            }
            (0x02, standard::CLEAR_FEATURE) if value == standard::ENDPOINT_HALT => {
                if !matches!(index, 0x00 | 0x80) {
                    let (function, pipe) = self.find(u8::try_from(index).ok()?)?;
                    function.clear_halt(pipe);
                }
                Some(Vec::new())
            }
            (0x02, standard::SET_FEATURE) if value == standard::ENDPOINT_HALT => {
                let (function, pipe) = self.find(u8::try_from(index).ok()?)?;
                function.halted[pipe as usize] = true;
                Some(Vec::new())
            }
            (0x21, class::ABORT) => {
                let max_data = max_data(&self.config);
                self.interface(index)?;
                let Function { slots, queue, .. } = self.functions.get_mut(usize::from(index))?;
                let slot = slots.get_mut(usize::from(value_low))?;
                let actions = &mut self.actions;
                slot.abort_control(value_high, &mut Context { queue, actions, max_data, now });
                Some(Vec::new())
            }
            (0xA1, class::GET_CLOCK_FREQUENCIES) => {
                self.interface(index).map(|_| CLOCK_KHZ.to_le_bytes().to_vec())
            }
            (0xA1, class::GET_DATA_RATES) => {
                self.interface(index).map(|_| DATA_RATES.into_iter().flat_map(u32::to_le_bytes).collect())
            }
            _ => None,
        }
    }

    /// A bulk-OUT transfer: a message to the reader or a part of one (USB CCID 1.1 §6.1).
    ///
    /// A transfer too short to be a message, and one that comes while 64 answers or 1 MiB of them wait to be
    /// read, is refused and halts the endpoint.
    pub fn bulk_out(&mut self, endpoint: u8, data: &[u8], now: Instant) -> TransferOutcome {
        let Some((index, Pipe::BulkOut)) = self.locate(endpoint) else { return TransferOutcome::Stall };
        let Self { config, functions, actions, .. } = self;
        let Some(function) = functions.get_mut(index) else { return TransferOutcome::Stall };
        if !function.has_room() {
            function.halted[Pipe::BulkOut as usize] = true;
        }
        let Function { slots, assembler, queue, halted: [halted, ..], .. } = function;
        if *halted {
            return TransferOutcome::Stall;
        }
        let (header, data) = match assembler.push(data, SMALLEST_PACKET, config.max_message) {
            Assembled::More => return TransferOutcome::Accepted,
            Assembled::Message(header, data) => (header, Ok(data)),
            Assembled::WrongLength(header) => (header, Err(ErrorCode::LENGTH)),
            Assembled::Runt => {
                *halted = true;
                return TransferOutcome::Stall;
            }
        };
        queue.command_came(header.slot);
        match slots.get_mut(usize::from(header.slot)) {
            Some(slot) => {
                let mut context = Context { queue, actions, max_data: max_data(config), now };
                match data {
                    Ok(data) => slot.message(header, data.expose(), &mut context),
                    Err(error) => slot.fail(header, error, &mut context),
                }
            }
            None => {
                // A bSlot beyond bMaxSlotIndex makes libccid write beyond its tables, so none is ever sent.
                let ids = [0, header.seq];
                let parameters = &Parameters::DEFAULT;
                let message = failure(header.kind, ids, IccStatus::Absent, ErrorCode::SLOT, parameters);
                queue.push(0, message, Validity::default());
            }
        }
        TransferOutcome::Accepted
    }

    /// A bulk-IN transfer of at most `max` bytes: an answer of the reader or a part of one (USB CCID 1.1
    /// §6.2).
    ///
    /// The rest of a longer answer is for the next transfer. An answer that fills its last transfer with
    /// whole packets is followed by an empty transfer, for guests that split a long read into several; a
    /// guest that sends the slot its next command instead did not wait for it, and does not get it.
    ///
    /// Of a response whose [`Validity`] has ended the guest gets no more, but the status word 6982.
    pub fn bulk_in(&mut self, endpoint: u8, max: usize) -> InOutcome {
        let Some((function, Pipe::BulkIn)) = self.find(endpoint) else { return InOutcome::Stall };
        if function.halted[Pipe::BulkIn as usize] {
            return InOutcome::Stall;
        }
        let data = match max {
            0 => function.queue.is_ready().then(Secret::default),
            _ => function.queue.take(max, SMALLEST_PACKET),
        };
        data.map_or(InOutcome::Nothing, InOutcome::Data)
    }

    /// For how long what [`bulk_in`](Self::bulk_in) gave last may be read.
    pub(crate) fn bulk_in_validity(&self, endpoint: u8) -> Validity {
        match self.locate(endpoint) {
            Some((index, Pipe::BulkIn)) => {
                self.functions.get(index).map(|function| function.queue.last_validity())
            }
            _ => None,
        }
        .unwrap_or_default()
    }

    /// What [`bulk_in`](Self::bulk_in) gave and the guest did not get, as when it crossed a cancel: it goes
    /// back to the head of the queue. Of several, the newest is given back first; the newest 32 can be.
    ///
    /// Nothing that was given before the answers were last thrown away (reset, configuration, CLEAR_FEATURE)
    /// comes back.
    pub fn bulk_in_return(&mut self, endpoint: u8, data: Secret) {
        if let Some((function, Pipe::BulkIn)) = self.find(endpoint) {
            function.queue.give_back(data);
        }
    }

    /// An interrupt-IN transfer: RDR_to_PC_NotifySlotChange with all slots of the interface, when a card came
    /// or went since the last one (USB CCID 1.1 §6.3.1). After configuration, cards that are in have
    /// come.
    pub fn interrupt_in(&mut self, endpoint: u8) -> InOutcome {
        match self.find(endpoint) {
            Some((function, Pipe::Interrupt)) if !function.halted[Pipe::Interrupt as usize] => {
                function.notify().map_or(InOutcome::Nothing, InOutcome::Data)
            }
            _ => InOutcome::Stall,
        }
    }

    /// The guest did not get what [`interrupt_in`](Self::interrupt_in) gave last: the changes are told again.
    pub fn interrupt_in_return(&mut self, endpoint: u8) {
        if let Some((function, Pipe::Interrupt)) = self.find(endpoint) {
            let notified = std::mem::take(&mut function.notified);
            for slot in &mut function.slots {
                slot.changed |= notified & (1 << slot.number) != 0;
            }
        }
    }

    /// Whether an IN transfer on `endpoint` would end now, with data or with STALL.
    pub fn in_ready(&self, endpoint: u8) -> bool {
        let Some((index, pipe)) = self.locate(endpoint) else { return false };
        let Some(function) = self.functions.get(index) else { return false };
        function.halted[pipe as usize]
            || match pipe {
                Pipe::BulkOut => false,
                Pipe::BulkIn => function.queue.is_ready(),
                Pipe::Interrupt => function.slots.iter().any(|slot| slot.changed),
            }
    }

    /// A bus reset (USB 2.0 §7.1.7.5), also what a carrier calls when its guest is gone: no configuration,
    /// nothing waits to be read, commands at work are forgotten, and every card that was powered is to be
    /// powered off.
    pub fn reset(&mut self, _now: Instant) {
        self.configure(0);
    }

    fn configure(&mut self, configuration: u8) {
        self.configuration = configuration;
        for function in &mut self.functions {
            function.reset(&mut self.actions);
        }
    }

    // ---- the cards' side --------------------------------------------------------------------------------

    /// A card is in `slot`, unpowered. If there was one already, it was another and is
    /// [removed](Self::remove) first. The guest is notified once, and finds the card unpowered.
    pub fn insert(&mut self, slot: SlotId, now: Instant) {
        if let Some((slot, mut context)) = self.slot(slot, now) {
            slot.insert(&mut context);
        }
    }

    /// The card is gone. A command at work fails with ICC_MUTE. The embedder ends the card's session by
    /// itself: actions on the slot that were not polled yet, a power-off included, are void.
    pub fn remove(&mut self, slot: SlotId, now: Instant) {
        if let Some((slot, mut context)) = self.slot(slot, now) {
            slot.remove(&mut context);
        }
    }

    /// What an action came to. It is ignored when the guest no longer waits for it: after a reset, an ABORT
    /// or a removal.
    pub fn complete(&mut self, token: Token, outcome: Outcome, now: Instant) {
        let max_data = max_data(&self.config);
        for Function { slots, queue, .. } in &mut self.functions {
            if let Some(slot) = slots.iter_mut().find(|slot| slot.waits_for(token)) {
                let mut context = Context { queue, actions: &mut self.actions, max_data, now };
                return slot.complete(token, outcome, &mut context);
            }
        }
    }

    /// What is to be done next with the cards. To be called until there is nothing, after anything else was.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.queue.pop_front()
    }

    // ---- time -------------------------------------------------------------------------------------------

    /// When [`handle_deadline`](Self::handle_deadline) has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.functions.iter().flat_map(|function| &function.slots).filter_map(Slot::deadline).min()
    }

    /// Asks the guest for more time for each command that is without a response for a second, and every
    /// second from then on (USB CCID 1.1 §6.2.6, bmCommandStatus 2); fails a power-on after 30 seconds.
    pub fn handle_deadline(&mut self, now: Instant) {
        let max_data = max_data(&self.config);
        for Function { slots, queue, .. } in &mut self.functions {
            for slot in slots {
                let actions = &mut self.actions;
                slot.handle_deadline(&mut Context { queue, actions, max_data, now });
            }
        }
    }

    // ---- small ------------------------------------------------------------------------------------------

    /// The interface and pipe of an endpoint, if the device is configured and has it.
    fn locate(&self, endpoint: u8) -> Option<(usize, Pipe)> {
        let (index, pipe) = Pipe::of_address(endpoint)?;
        (self.configuration != 0 && index < self.functions.len()).then_some((index, pipe))
    }

    fn find(&mut self, endpoint: u8) -> Option<(&mut Function, Pipe)> {
        let (index, pipe) = self.locate(endpoint)?;
        Some((self.functions.get_mut(index)?, pipe))
    }

    /// The interface of a request, if the device is configured and has it.
    fn interface(&mut self, index: u16) -> Option<&mut Function> {
        let configured = self.configuration != 0;
        self.functions.get_mut(usize::from(index)).filter(|_| configured)
    }

    fn slot(&mut self, SlotId(id): SlotId, now: Instant) -> Option<(&mut Slot, Context<'_>)> {
        let (_, slots) = descriptor::shape(self.config.layout);
        let max_data = max_data(&self.config);
        let Function { slots, queue, .. } = self.functions.get_mut(usize::from(id / slots))?;
        let slot = slots.iter_mut().find(|slot| slot.id == SlotId(id))?;
        Some((slot, Context { queue, actions: &mut self.actions, max_data, now }))
    }
}

/// Longest abData.
fn max_data(config: &DeviceConfig) -> usize {
    config.max_message as usize - HEADER
}

impl Function {
    pub(crate) fn reset(&mut self, actions: &mut Actions) {
        self.assembler = Assembler::default();
        self.queue.clear();
        self.halted = [false; 3];
        self.notified = 0;
        for slot in &mut self.slots {
            slot.reset(actions);
        }
    }

    fn clear_halt(&mut self, pipe: Pipe) {
        self.halted[pipe as usize] = false;
        match pipe {
            Pipe::BulkOut => self.assembler = Assembler::default(),
            // The host starts anew; an answer to something it gave up would be taken for another.
            Pipe::BulkIn => self.queue.clear(),
            Pipe::Interrupt => {}
        }
    }

    /// Whether one more command can be answered.
    fn has_room(&self) -> bool {
        let owed: usize = self.slots.iter().map(Slot::owed).sum();
        self.queue.len() + owed < MOST_ANSWERS && self.queue.bytes() < MOST_BYTES
    }

    /// RDR_to_PC_NotifySlotChange, if there is a change (USB CCID 1.1 §6.3.1).
    fn notify(&mut self) -> Option<Secret> {
        if !self.slots.iter().any(|slot| slot.changed) {
            return None;
        }
        self.notified = 0;
        let mut message = vec![0; 1 + self.slots.len().div_ceil(4)];
        message[0] = 0x50;
        for slot in &mut self.slots {
            let changed = std::mem::take(&mut slot.changed);
            let bits = u8::from(slot.is_present()) | u8::from(changed) << 1;
            message[1 + usize::from(slot.number / 4)] |= bits << (2 * (slot.number % 4));
            self.notified |= u16::from(changed) << slot.number;
        }
        Some(Secret::new(message))
    }
}

impl Actions {
    pub(crate) fn power_on(&mut self, slot: SlotId) -> Token {
        let token = self.token();
        self.queue.push_back(Action::PowerOn { token, slot });
        token
    }

    pub(crate) fn transmit(&mut self, slot: SlotId, command: Command) -> Token {
        let token = self.token();
        self.queue.push_back(Action::Transmit { token, slot, command });
        token
    }

    /// What the slot was to do before it is void.
    pub(crate) fn power_off(&mut self, slot: SlotId) {
        self.forget(slot);
        self.queue.push_back(Action::PowerOff { slot });
    }

    /// Drops all the slot was to do.
    pub(crate) fn forget(&mut self, slot: SlotId) {
        self.queue.retain(|action| action.slot() != slot);
    }

    /// Drops the command the slot was to be given.
    pub(crate) fn forget_transmit(&mut self, slot: SlotId) {
        self.queue.retain(|action| !matches!(action, Action::Transmit { slot: of, .. } if *of == slot));
    }

    fn token(&mut self) -> Token {
        let token = Token(self.next);
        self.next = self.next.wrapping_add(1);
        token
    }
}

/// bRequest of the standard requests (USB 2.0 §9.4).
mod standard {
    pub(super) const GET_STATUS: u8 = 0;
    pub(super) const CLEAR_FEATURE: u8 = 1;
    pub(super) const SET_FEATURE: u8 = 3;
    pub(super) const SET_ADDRESS: u8 = 5;
    pub(super) const GET_DESCRIPTOR: u8 = 6;
    pub(super) const GET_CONFIGURATION: u8 = 8;
    pub(super) const SET_CONFIGURATION: u8 = 9;
    pub(super) const GET_INTERFACE: u8 = 10;
    pub(super) const SET_INTERFACE: u8 = 11;
    /// The feature of an endpoint.
    pub(super) const ENDPOINT_HALT: u16 = 0;
}

/// bRequest of the class's requests (USB CCID 1.1 §5.3).
mod class {
    pub(super) const ABORT: u8 = 1;
    pub(super) const GET_CLOCK_FREQUENCIES: u8 = 2;
    pub(super) const GET_DATA_RATES: u8 = 3;
}
