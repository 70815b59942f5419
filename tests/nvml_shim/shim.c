/* libnvidia-ml.so.1 that replays power traces, for unmodified readers of NVML.
 *
 * Struct layouts and codes are those of nvml.h. A device is a list of rows (time, power, event), read from the CSV
 * SHIM_TRACE and, while running, from the control file SHIM_CONTROL, to which tests append. Energy is the exact
 * integral of the rows. Settings come from the environment; shim.py writes them and documents each.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST_DEVICES 16
#define INSTANCES 2 /* of each GPU under MIG */

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, LOST = 15 };

/* As packed by shim.py. Field 0 of an event means the whole device. */
typedef struct { double time, power; int32_t device, event, field, code; } row_t;
typedef struct { double virtual_seconds; uint64_t rows; row_t row[]; } control_t;
enum { POWER = 0, RESET = 1, FAIL = 2, MEND = 3, FREEZE = 4 };

typedef struct {
    char uuid[96], name[96];
    row_t *row;       /* in order of time */
    double *joules;   /* up to each row */
    int rows, room;
    long summed_tick; /* part-time sensor: ticks added up so far */
    double summed;
} device_t;

static device_t device[MOST_DEVICES];
static int devices, opened;
static pid_t owner;
static uint64_t taken; /* rows of the control file already read */
static control_t *control;
static FILE *call_log;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { double tick, phase, lag, duty, power_tick, power_window, gain, base, speed, epoch, delay; int mig, scope, virtual; } set;

static double number(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text && *text ? atof(text) : otherwise;
}

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double now(void) {
    if (set.virtual) return control ? *(volatile double *)&control->virtual_seconds : 0.0;
    return (seconds(CLOCK_MONOTONIC) - set.epoch) * set.speed;
}

static void add(row_t row) {
    if (row.device < 0 || row.device >= devices) return;
    device_t *d = &device[row.device];
    if (d->rows == d->room) {
        d->room = d->room ? 2 * d->room : 64;
        d->row = realloc(d->row, (size_t)d->room * sizeof *d->row);
        d->joules = realloc(d->joules, (size_t)d->room * sizeof *d->joules);
    }
    row_t *last = d->rows ? &d->row[d->rows - 1] : NULL;
    if (last && row.time < last->time) row.time = last->time;
    if (isnan(row.power)) row.power = last ? last->power : 0.0;
    d->joules[d->rows] = last ? d->joules[d->rows - 1] + (row.time - last->time) * last->power : 0.0;
    d->row[d->rows++] = row;
}

static int load(void) {
    set.tick = number("SHIM_TICK", 0.1), set.phase = number("SHIM_PHASE", 0), set.lag = number("SHIM_LAG", 0);
    set.duty = number("SHIM_DUTY", 1), set.gain = number("SHIM_GAIN", 1), set.base = number("SHIM_BASE", 123456.789);
    set.power_tick = number("SHIM_POWER_TICK", 0.1), set.power_window = number("SHIM_POWER_WINDOW", 0.025);
    set.speed = number("SHIM_SPEED", 1), set.epoch = number("SHIM_EPOCH", 0), set.delay = number("SHIM_DELAY", 0);
    set.mig = (int)number("SHIM_MIG", 0), set.scope = (int)number("SHIM_SCOPE", 0);
    set.virtual = (int)number("SHIM_VIRTUAL", 0);
    const char *names = getenv("SHIM_DEVICES");
    devices = 0;
    for (const char *p = names ? names : "NVIDIA H200|GPU-00000000-0000-0000-0000-000000000000"; *p && devices < MOST_DEVICES;) {
        device_t *d = &device[devices++];
        memset(d, 0, sizeof *d);
        if (sscanf(p, "%95[^|]|%95[^;]", d->name, d->uuid) != 2) return INVALID;
        p += strcspn(p, ";");
        p += *p == ';';
    }
    char line[512];
    const char *trace = getenv("SHIM_TRACE");
    FILE *file = trace ? fopen(trace, "r") : NULL;
    if (trace && !file) return NOT_FOUND;
    while (file && fgets(line, sizeof line, file)) {
        row_t row = {0};
        if (sscanf(line, "%lf,%d,%lf,%d,%d,%d", &row.time, &row.device, &row.power, &row.event, &row.field, &row.code) >= 3)
            add(row);
    }
    if (file) fclose(file);
    for (int i = 0; i < devices; i++)
        if (!device[i].rows) add((row_t){.power = 75.0, .device = i});
    const char *log = getenv("SHIM_LOG"), *path = getenv("SHIM_CONTROL");
    if (log && !call_log) call_log = fopen(log, "a");
    taken = 0;
    if (path && !control) {
        int file_number = open(path, O_RDONLY);
        off_t size = file_number < 0 ? 0 : lseek(file_number, 0, SEEK_END);
        void *memory = size > 0 ? mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, file_number, 0) : MAP_FAILED;
        if (file_number >= 0) close(file_number);
        if (memory == MAP_FAILED) return NOT_FOUND;
        control = memory;
    }
    return OK;
}

static void follow(void) {
    uint64_t rows = control ? __atomic_load_n(&control->rows, __ATOMIC_ACQUIRE) : 0;
    for (; taken < rows; taken++) add(control->row[taken]);
}

/* The last row that is not after t. */
static int at(const device_t *d, double t) {
    int low = 0, high = d->rows - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (d->row[middle].time <= t) low = middle;
        else high = middle - 1;
    }
    return low;
}

static double joules(const device_t *d, double t) {
    int i = at(d, t);
    return d->joules[i] + (t > d->row[i].time ? (t - d->row[i].time) * d->row[i].power : 0.0);
}

/* What the counter counts up to its k-th tick. A part-time sensor sees the end of each tick and takes it for all. */
static double counted(device_t *d, long tick) {
    double end = (double)tick * set.tick + set.phase - set.lag;
    if (set.duty >= 1.0) return joules(d, end > 0 ? end : 0);
    if (tick < d->summed_tick) d->summed_tick = 0, d->summed = 0.0;
    for (; d->summed_tick < tick; d->summed_tick++) {
        double to = (double)(d->summed_tick + 1) * set.tick + set.phase - set.lag, from = to - set.duty * set.tick;
        if (from > 0) d->summed += (joules(d, to) - joules(d, from)) / set.duty;
    }
    return d->summed;
}

static long tick_of(double t) { return (long)floor((t - set.phase) / set.tick + 1e-9); }

/* Events up to t: the failure in force for a field (0: for the device), when the counter was reset or frozen. */
typedef struct { int code; double reset, frozen; } condition_t;
static condition_t condition(const device_t *d, double t, int field) {
    condition_t c = {OK, -1.0, -1.0};
    for (int i = 0; i < d->rows && d->row[i].time <= t; i++) {
        const row_t *row = &d->row[i];
        if (row->event == RESET) c.reset = row->time;
        if (row->event == FREEZE) c.frozen = row->time;
        if (row->event == MEND) c.code = OK, c.frozen = -1.0;
        if (row->event == FAIL && row->field == field) c.code = row->code;
    }
    return c;
}

static uint64_t millijoules(device_t *d) {
    double t = now();
    condition_t c = condition(d, t, 83);
    if (c.frozen >= 0) t = c.frozen;
    double total = counted(d, tick_of(t));
    if (c.reset < 0) return (uint64_t)llround(1e3 * (set.base + set.gain * total));
    double since = total - counted(d, tick_of(c.reset));
    return since > 0 ? (uint64_t)llround(1e3 * set.gain * since) : 0;
}

static unsigned milliwatts(const device_t *d, double window) {
    double t = floor(now() / set.power_tick + 1e-9) * set.power_tick - set.lag;
    if (t < 0) t = 0;
    double from = t > window ? t - window : 0;
    double watts = t > from ? (joules(d, t) - joules(d, from)) / (t - from) : d->row[at(d, t)].power;
    return (unsigned)llround(1e3 * set.gain * watts);
}

/* Handles: the address of a device; with the lowest bits 1, 3, ... those of its MIG instances. */
static device_t *of(void *handle, int *instance) {
    uintptr_t bits = (uintptr_t)handle;
    *instance = bits & 1 ? (int)(bits & 7) / 2 : -1;
    device_t *d = (device_t *)(bits & ~(uintptr_t)7);
    return d >= device && d < device + devices ? d : NULL;
}

static int logged(const char *function, int code) {
    if (call_log) {
        fprintf(call_log, "%d %ld %.6f %s %d\n", getpid(), syscall(SYS_gettid), now(), function, code);
        fflush(call_log);
    }
    return code;
}

/* Every call on a device: latency, fork strictness, events. The lock is held when the answer is OK or an error. */
static int enter(void *handle, device_t **d, int *instance) {
    if (set.delay > 0) {
        struct timespec pause = {(time_t)set.delay, (long)(1e9 * fmod(set.delay, 1.0))};
        nanosleep(&pause, NULL);
    }
    pthread_mutex_lock(&lock);
    if (!opened || owner != getpid()) return UNINITIALIZED;
    follow();
    if (!(*d = of(handle, instance))) return INVALID;
    return condition(*d, now(), 0).code;
}

static int leave(const char *function, int code) {
    logged(function, code);
    pthread_mutex_unlock(&lock);
    return code;
}

#define CALL(handle)                                   \
    device_t *d = NULL;                                \
    int instance = -1, code = enter(handle, &d, &instance); \
    (void)instance;                                    \
    if (code) return leave(__func__, code)
#define ANSWER(code) return leave(__func__, code)

static int text(char *to, unsigned room, const char *from) {
    if (strlen(from) + 1 > room) return TOO_SMALL;
    strcpy(to, from);
    return OK;
}

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    if (opened && owner != getpid()) opened = 0;
    int code = (int)number("SHIM_INIT_CODE", 0);
    double pause = number("SHIM_INIT_DELAY", 0);
    if (pause > 0) usleep((useconds_t)(1e6 * pause));
    if (!code && !opened) code = load();
    if (!code) opened++, owner = getpid();
    ANSWER(code);
}
EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
EXPORT int nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    int code = opened && owner == getpid() ? OK : UNINITIALIZED;
    if (!code) opened--;
    ANSWER(code);
}
EXPORT const char *nvmlErrorString(int code) {
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}
EXPORT int nvmlSystemGetDriverVersion(char *to, unsigned room) { return opened ? text(to, room, "580.00.00") : UNINITIALIZED; }
EXPORT int nvmlSystemGetNVMLVersion(char *to, unsigned room) { return opened ? text(to, room, "13.580.00.00") : UNINITIALIZED; }
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return opened ? OK : UNINITIALIZED; }

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    pthread_mutex_lock(&lock);
    *count = (unsigned)devices;
    ANSWER(opened && owner == getpid() ? OK : UNINITIALIZED);
}
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    pthread_mutex_lock(&lock);
    if (!opened || owner != getpid()) ANSWER(UNINITIALIZED);
    if (index >= (unsigned)devices) ANSWER(INVALID);
    *handle = &device[index];
    ANSWER(OK);
}
static void *instance_handle(device_t *d, int i) { return (void *)((uintptr_t)d | (uintptr_t)(1 + 2 * i)); }
static void instance_uuid(const device_t *d, int i, char to[128]) { snprintf(to, 128, "MIG-%d%s", i, d->uuid + 5); }
EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    pthread_mutex_lock(&lock);
    if (!opened || owner != getpid()) ANSWER(UNINITIALIZED);
    for (int i = 0; i < devices; i++) {
        if (!strcmp(uuid, device[i].uuid)) {
            *handle = &device[i];
            ANSWER(OK);
        }
        for (int k = 0; set.mig && k < INSTANCES; k++) {
            char name[128];
            instance_uuid(&device[i], k, name);
            if (!strcmp(uuid, name)) {
                *handle = instance_handle(&device[i], k);
                ANSWER(OK);
            }
        }
    }
    ANSWER(NOT_FOUND);
}
EXPORT int nvmlDeviceGetName(void *handle, char *to, unsigned room) { CALL(handle); ANSWER(text(to, room, d->name)); }
EXPORT int nvmlDeviceGetUUID(void *handle, char *to, unsigned room) {
    CALL(handle);
    char name[128];
    instance_uuid(d, instance, name);
    ANSWER(text(to, room, instance < 0 ? d->uuid : name));
}
EXPORT int nvmlDeviceGetIndex(void *handle, unsigned *index) { CALL(handle); *index = (unsigned)(d - device); ANSWER(OK); }
EXPORT int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) { CALL(handle); *current = *pending = (unsigned)set.mig; ANSWER(OK); }
EXPORT int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) { CALL(handle); *count = set.mig ? 7 : 0; ANSWER(OK); }
EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **found) {
    CALL(handle);
    if (!set.mig || index >= INSTANCES) ANSWER(NOT_FOUND);
    *found = instance_handle(d, (int)index);
    ANSWER(OK);
}
EXPORT int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **found) { CALL(handle); *found = d; ANSWER(instance < 0 ? INVALID : OK); }
EXPORT int nvmlDeviceIsMigDeviceHandle(void *handle, unsigned *is) { CALL(handle); *is = instance >= 0; ANSWER(OK); }
EXPORT int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) { CALL(handle); *major = 9, *minor = 0; ANSWER(OK); }
EXPORT int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *celsius) { (void)sensor; CALL(handle); *celsius = 45; ANSWER(OK); }
EXPORT int nvmlDeviceGetClockInfo(void *handle, unsigned clock, unsigned *mhz) { CALL(handle); *mhz = clock == 1 ? 1980 : 3201; ANSWER(OK); }

/* An instance has no energy and no power of its own. */
static int field_code(const device_t *d, int instance, int field) {
    return instance >= 0 ? NOT_SUPPORTED : condition(d, now(), field).code;
}
EXPORT int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy) {
    CALL(handle);
    if ((code = field_code(d, instance, 83))) ANSWER(code);
    *energy = millijoules(d);
    ANSWER(OK);
}
EXPORT int nvmlDeviceGetPowerUsage(void *handle, unsigned *power) {
    CALL(handle);
    if ((code = field_code(d, instance, 185))) ANSWER(code);
    *power = milliwatts(d, 1.0);
    ANSWER(OK);
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned type;
    int code;
    union { double d; unsigned u; unsigned long long ull; } value;
} field_t;
EXPORT int nvmlDeviceGetFieldValues(void *handle, int count, field_t *v) {
    CALL(handle);
    for (int i = 0; i < count; i++) {
        v[i].timestamp = (long long)(1e6 * (set.virtual ? now() : seconds(CLOCK_REALTIME)));
        v[i].latency = 1;
        v[i].code = field_code(d, instance, (int)v[i].field);
        if (v[i].code) continue;
        if (v[i].scope != (unsigned)set.scope) v[i].code = NOT_SUPPORTED;
        else if (v[i].field == 83) v[i].type = 3, v[i].value.ull = millijoules(d);
        else if (v[i].field == 186) v[i].type = 1, v[i].value.u = milliwatts(d, set.power_window);
        else if (v[i].field == 185) v[i].type = 1, v[i].value.u = milliwatts(d, 1.0);
        else v[i].code = NOT_SUPPORTED;
    }
    ANSWER(OK);
}
