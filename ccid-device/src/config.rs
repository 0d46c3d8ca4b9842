//! What a reader looks like to the guest.

use thiserror::Error;

/// Most slots one interface can have: pcsc-lite has 16 reader contexts in all.
const MAX_SLOTS: u8 = 16;
/// Most interfaces one device can have: each needs two of the 15 IN endpoints (USB 2.0 §5.3.1.2).
const MAX_INTERFACES: u8 = 7;
/// Bounds of dwMaxCCIDMessageLength for the extended APDU level (USB CCID 1.1 §5.1).
const MESSAGE_LENGTHS: std::ops::RangeInclusive<u32> = 271..=65_554;
/// Longest string descriptor: 255 bytes, two of them header (USB 2.0 §9.6.7).
const MAX_STRING: usize = 126;

/// What a reader looks like to the guest.
///
/// ```
/// use ccid_device::{DeviceConfig, Layout};
/// let config = DeviceConfig { layout: Layout::Slots(4), ..DeviceConfig::new("vm1") };
/// assert_eq!((config.vendor_id, config.product_id), (0x08E6, 0x4433));
/// assert!(config.check().is_ok());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// idVendor. libccid takes a reader only by a listed pair of identifiers.
    pub vendor_id: u16,
    /// idProduct.
    pub product_id: u16,
    /// The manufacturer's string; none if empty.
    pub manufacturer: String,
    /// The product's string, also the name of each interface, which pcscd shows in the reader's name; none
    /// if empty.
    pub product: String,
    /// The serial number; none if empty. No two readers of a machine should share one.
    pub serial: String,
    /// The speed of the bus it is plugged into.
    pub speed: Speed,
    /// Slots and interfaces.
    pub layout: Layout,
    /// dwMaxCCIDMessageLength, 271 to 65 554. Longer APDUs are chained; with 65 554 there are none.
    pub max_message: u32,
}

impl DeviceConfig {
    /// A high-speed reader of one slot with the identifiers of QEMU's, and no chaining.
    pub fn new(serial: impl Into<String>) -> Self {
        Self {
            vendor_id: 0x08E6,
            product_id: 0x4433,
            manufacturer: "Virtual Smartcard".to_owned(),
            product: "Virtual Smartcard Reader".to_owned(),
            serial: serial.into(),
            speed: Speed::High,
            layout: Layout::Slots(1),
            max_message: *MESSAGE_LENGTHS.end(),
        }
    }

    /// Whether there can be such a reader.
    ///
    /// # Errors
    /// [`ConfigError`] says what is wrong with it.
    pub fn check(&self) -> Result<(), ConfigError> {
        match self.layout {
            Layout::Slots(1..=MAX_SLOTS) | Layout::Interfaces(1..=MAX_INTERFACES) => {}
            Layout::Slots(slots) => return Err(ConfigError::Slots(slots)),
            Layout::Interfaces(interfaces) => return Err(ConfigError::Interfaces(interfaces)),
        }
        if !MESSAGE_LENGTHS.contains(&self.max_message) {
            return Err(ConfigError::MaxMessage(self.max_message));
        }
        for (field, string) in
            [("manufacturer", &self.manufacturer), ("product", &self.product), ("serial", &self.serial)]
        {
            let length = string.encode_utf16().count();
            if length > MAX_STRING {
                return Err(ConfigError::StringTooLong { field, length });
            }
        }
        Ok(())
    }
}

/// The speed of the bus a device is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Speed {
    /// 12 Mbit/s: UHCI and OHCI controllers.
    Full,
    /// 480 Mbit/s: EHCI and xHCI controllers.
    High,
}

/// How the slots of a reader are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// One interface with 1 to 16 slots. For Linux guests; other systems' drivers may know the first slot
    /// only.
    Slots(u8),
    /// 1 to 7 interfaces of one slot each, which a guest takes for as many readers (USB CCID 1.1 §4.1).
    Interfaces(u8),
}

impl Layout {
    /// Slots in all.
    pub fn slots(self) -> u8 {
        let (Self::Slots(slots) | Self::Interfaces(slots)) = self;
        slots
    }
}

/// Why there can be no such reader.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// No slots, or more than 16 in one interface.
    #[error("a reader has 1 to 16 slots, not {0}: with more, a Linux guest's pcscd refuses the whole reader")]
    Slots(u8),
    /// No interfaces, or more than 7.
    #[error("a reader has 1 to 7 interfaces, not {0}: each needs two of the 15 IN endpoints of a USB device")]
    Interfaces(u8),
    /// A message length outside 271 to 65 554.
    #[error("the longest message of {0} bytes is outside 271 to 65554 (dwMaxCCIDMessageLength)")]
    MaxMessage(u32),
    /// A string that does not fit a descriptor.
    #[error("the {field} string has {length} UTF-16 units; a USB string descriptor holds 126")]
    StringTooLong {
        /// Which string.
        field: &'static str,
        /// How long it is.
        length: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(change: impl FnOnce(&mut DeviceConfig)) -> String {
        let mut config = DeviceConfig::new("1");
        change(&mut config);
        config.check().unwrap_err().to_string()
    }

    #[test]
    fn the_reason_is_given() {
        assert_eq!(
            error(|config| config.layout = Layout::Slots(17)),
            "a reader has 1 to 16 slots, not 17: with more, a Linux guest's pcscd refuses the whole reader"
        );
        assert!(error(|config| config.layout = Layout::Slots(0)).contains("not 0"));
        assert!(error(|config| config.layout = Layout::Interfaces(8)).contains("15 IN endpoints"));
        assert!(error(|config| config.max_message = 270).contains("270"));
        assert!(error(|config| config.max_message = 65_555).contains("65555"));
        assert!(error(|config| config.serial = "x".repeat(127)).contains("serial string has 127"));
    }

    #[test]
    fn limits_are_inclusive() {
        for layout in [Layout::Slots(1), Layout::Slots(16), Layout::Interfaces(1), Layout::Interfaces(7)] {
            for max_message in [271, 65_554] {
                let serial = "\u{1F4B3}".repeat(63);
                let config = DeviceConfig { layout, max_message, ..DeviceConfig::new(serial) };
                assert_eq!(config.check(), Ok(()));
            }
        }
    }
}
